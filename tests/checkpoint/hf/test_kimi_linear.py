"""Kimi Linear equals transformers' own class, both ways, in every layout its folders come in."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moebius.checkpoint.hf import Target, Wanted
from moebius.checkpoint.hf.exporter import export_hf
from moebius.checkpoint.hf.importer import import_hf
from moebius.checkpoint.hf.keys import HARMLESS, Keys
from moebius.checkpoint.hf.kimi_linear import KimiLinear
from moebius.config import override
from moebius.infer.load import load
from moebius.model.block.prenorm import PreNorm
from moebius.model.ends.mtp import MTP
from moebius.model.ffn.balance.sign import Sign
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.sigmoid import Sigmoid
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.kda import KDA
from moebius.model.mixers.mla import MLA
from moebius.recipes.kimi import kimi_linear

from .families import refused as refused_by
from .parity import (
    FORWARD,
    Twin,
    check_all,
    check_bf16,
    check_forward,
    check_fresh,
    fresh_run,
    our_logits,
    relative,
    say,
    transformers,
)

pytestmark = pytest.mark.usefixtures("one_thread")
refused = partial(refused_by, KimiLinear())

LINEAR: dict[str, Any] = {
    "full_attn_layers": [4],
    "kda_layers": [1, 2, 3],
    "num_heads": 3,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
}
# Widths are multiples of 4: torch's grouped products, which the peer uses, take no others.
BASE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 40,
    "intermediate_size": 28,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 7,
    "linear_attn_config": LINEAR,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 128,
    # Or a token would end the peer's greedy decoding.
    "eos_token_id": None,
    "pad_token_id": None,
    "bos_token_id": None,
}
CASES: dict[str, dict[str, Any]] = {
    "as published": {},
    "groups, latent queries, biases, mixed layers": {
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 14,
        "attention_bias": True,
        "n_shared_experts": 2,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mlp_layer_types": ["sparse", "dense", "sparse", "dense"],
        "linear_attn_config": {"num_heads": 5, "head_dim": 10, "short_conv_kernel_size": 2},
    },
    "top 1, not renormalised": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "top 12": {"num_experts_per_tok": 12, "num_local_experts": 16, "num_hidden_layers": 2}
    | {"linear_attn_config": LINEAR | {"kda_layers": [1], "full_attn_layers": [2]}},
}


def config(**changes: Any) -> Any:
    return transformers.KimiLinearConfig(**{**BASE, **changes})


def twin_of(home: Path, **changes: Any) -> Twin:
    """Its convolutions are large. Queries, keys and outputs are divided by their lengths, which
    near 0 would make more of rounding, the peer's and ours, than parity can see through.
    """
    twin = Twin(config(**changes), home, seed=2)
    for layer in twin.peer.model.layers:
        if layer.block_type == "linear_attention":
            layer.self_attn.conv1d.weight.data *= 3
    return twin


def published(twin: Twin) -> Twin:
    """Its folder under the published names: transformers saves dense layers as mixtures."""
    path = twin.folder / "model.safetensors"
    dense = [i for i, kind in enumerate(twin.config.mlp_layer_types) if kind == "dense"]
    tensors = load_file(path)
    for i in dense:
        for name in [x for x in tensors if x.startswith(f"model.layers.{i}.block_sparse_moe.")]:
            tensors[name.replace("block_sparse_moe", "mlp")] = tensors.pop(name)
    save_file(tensors, path, {"format": "pt"})
    return twin


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_import_and_export_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_all(published(twin_of(tmp_path, **changes)))


def test_bf16_is_as_near_as_transformers_to_itself(tmp_path: Path) -> None:
    """With the routing pinned. Without, single choices flip in the peer's bf16 and in ours, not
    always the same, and then the two are as far from each other as either is from fp32.
    """
    few = {"num_hidden_layers": 2, "hidden_size": 64, "moe_intermediate_size": 24}
    linear = LINEAR | {"kda_layers": [1], "full_attn_layers": [2]}
    twin = twin_of(tmp_path, **few, linear_attn_config=linear)
    # Biases that outweigh any score, so that no rounding moves a selection.
    twin.peer.model.layers[1].mlp.gate.e_score_correction_bias.mul_(100)
    check_bf16(twin)


def test_names_of_saved_folders_are_read_and_published_ones_written(tmp_path: Path) -> None:
    twin = twin_of(tmp_path)
    saved = load_file(twin.folder / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.gate_proj.weight" in saved
    check_forward(twin)
    written = load_file(export_hf(twin.run, tmp_path / "out", say=say) / "model.safetensors")
    assert written.keys() != saved.keys()
    for name, x in saved.items():
        dense = "layers.0.block_sparse_moe"
        assert torch.equal(written[name.replace(dense, "layers.0.mlp")], x), name


def test_names_in_memory_are_read(tmp_path: Path) -> None:
    twin = twin_of(tmp_path)
    state = {name: x.contiguous() for name, x in twin.peer.state_dict().items()}
    assert {"conv1d.weight", "forget_gate.A_log"} <= {x.split("self_attn.")[-1] for x in state}
    assert "model.layers.1.mlp.experts.gate_up_proj" in state
    save_file(state, twin.folder / "model.safetensors", {"format": "pt"})
    check_forward(twin)


PUBLISHED: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "head_dim": 128,
        "kda_layers": [i for i in range(1, 27) if i % 4],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1_048_576,
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_grouped_topk": True,
    "v_head_dim": 128,
    "vocab_size": 163_840,
}


def test_the_published_config_is_the_recipe() -> None:
    keys, recipe = Keys(PUBLISHED), kimi_linear()
    read = KimiLinear().read_config(keys)
    keys.finish(HARMLESS | KimiLinear.harmless)
    assert (read.model, read.vocab) == (recipe.model, recipe.vocab)
    # And back, every key of it.
    written = KimiLinear().write_config(recipe.model, 163_840, Wanted("vllm", 1_048_576))
    same = {key: x for key, x in PUBLISHED.items() if key not in ("head_dim", "rope_scaling")}
    assert written | same == written


ODD: dict[str, Any] = {
    "mla_use_nope": False,
    "tie_word_embeddings": True,
    "moe_router_activation_func": "softmax",
    "moe_layer_freq": 2,
    "rope_scaling": {"type": "yarn"},
    "layer_types": ["full_attention"],
    "gate_lower_bound": {"linear_attn_config": {"gate_lower_bound": -5.0}},
    "full_attn_layers": {"linear_attn_config": LINEAR | {"full_attn_layers": [0, 4]}},
    "odd_key": {"linear_attn_config": {"odd_key": 1}},
}


@pytest.mark.parametrize(("key", "value"), ODD.items(), ids=ODD)
def test_what_a_config_may_not_say_is_refused(key: str, value: Any) -> None:
    inside = isinstance(value, dict) and "linear_attn_config" in value
    with pytest.raises(ValueError, match=key):
        KimiLinear().read_config(Keys(PUBLISHED | (value if inside else {key: value})))


# --- models of our own ----------------------------------------------------------------------------

DELTA = KDA(heads=3, head_width=16, conv_width=3)
LATENT = MLA(3, None, 10, 8, 6, 7, rope_base=None)
MOE = MoE(
    experts=6,
    expert_width=12,
    top_k=2,
    shared_experts=1,
    scaling=1.5,
    router=Sigmoid(renormalise=True),
    balance=(Sign(),),
)


def model(*layers: PreNorm, **more: Any) -> ModelConfig:
    usual = (PreNorm(DELTA, Dense(20)), PreNorm(DELTA, MOE), PreNorm(LATENT, MOE))
    return ModelConfig(width=32, layers=layers or usual, **more)


@pytest.mark.parametrize(
    "ours",
    [
        model(tied=True),
        model(PreNorm(LATENT, MOE), PreNorm(LATENT, Dense(20))),
    ],
    ids=["tied", "no delta attention, dense last"],
)
def test_a_model_of_ours_runs_in_transformers(tmp_path: Path, ours: ModelConfig) -> None:
    out = check_fresh(ours, 300, tmp_path)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_servers_get_the_published_names(tmp_path: Path, target: Target) -> None:
    run, lm = fresh_run(model(tied=True), 300, tmp_path / "run")
    out = export_hf(run, tmp_path / "out", target=target, dtype="bf16", say=say)
    tensors = load_file(out / "model.safetensors")
    wide = {name.split(".")[-1] for name, x in tensors.items() if x.dtype == torch.float32}
    assert wide == {"A_log", "dt_bias", "e_score_correction_bias"}
    assert tensors["model.layers.0.self_attn.A_log"].shape == (1, 1, 3, 1)
    assert tensors["model.layers.0.self_attn.k_conv1d.weight"].shape == (48, 1, 3)
    for name in ("0.mlp.gate_proj", "1.block_sparse_moe.experts.5.w3"):
        assert f"model.layers.{name}.weight" in tensors
    exact = export_hf(run, tmp_path / "exact", target=target, say=say)
    back = load(import_hf(exact, tmp_path / "back", say=say))[0].lm
    tokens_BT = torch.arange(20)[None]
    with torch.no_grad():
        assert relative(our_logits(back, tokens_BT), our_logits(lm, tokens_BT)) < FORWARD


CANNOT: dict[str, list[str]] = {
    "mixer.rope_base: it does not rotate": ["layers.*.mixer.rope_base=1e4"],
    "mixer.lower_bound: its decay": ["layers.*.mixer.lower_bound=-5"],
    "mixer.negative_eigenvalues: its": ["layers.*.mixer.negative_eigenvalues=true"],
    "ffn.zero_experts: it has none": [
        "layers.*.ffn.zero_experts=2",
        "layers.*.ffn.ffn_per_token=1",
    ],
    "ffn.router is softmax": ["layers.*.ffn.router=softmax"],
}


@pytest.mark.parametrize(("reason", "changes"), CANNOT.items(), ids=CANNOT)
def test_what_it_cannot_hold_is_refused(reason: str, changes: list[str]) -> None:
    layers = {"lower": DELTA, "negat": DELTA}.get(reason[6:11], LATENT)
    ours = model(*(3 * (PreNorm(layers, MOE),)))
    refused(override(ours, changes), f"layers.*.{reason}")


def test_other_orders_and_parts_are_refused() -> None:
    refused(model(PreNorm(GQA(4, 2, 8), MOE)), "gqa where it has only kda or mla")
    refused(model(PreNorm(DELTA, Dense(20))), "needs a mixture of experts")
    refused(model(PreNorm(DELTA, MOE)), "layers.*.mixer: it needs one mla")
    late = model(PreNorm(DELTA, MOE), PreNorm(LATENT, Dense(20)))
    refused(late, "vllm has dense layers before all mixtures only", "vllm")
    alone = dataclasses.replace(MOE, shared_experts=0)
    refused(model(PreNorm(LATENT, alone)), "sglang needs one", "sglang")
    queries = dataclasses.replace(LATENT, q_rank=8)
    refused(model(PreNorm(queries, MOE)), "vllm has no latent for its queries", "vllm")
    predicts = dataclasses.replace(model(), ends=(MTP(LATENT, Dense(8)),))
    KimiLinear().write_config(predicts, 300, Wanted("transformers", 64))
