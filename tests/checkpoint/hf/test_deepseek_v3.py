"""DeepSeek-V3 equals transformers' own class, both ways; what it cannot hold is refused by name."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moebius.checkpoint.hf import Target
from moebius.checkpoint.hf.deepseek_v3 import DeepseekV3
from moebius.checkpoint.hf.exporter import export_hf
from moebius.checkpoint.hf.importer import import_hf
from moebius.checkpoint.hf.keys import HARMLESS, Keys
from moebius.config import override
from moebius.infer.load import load
from moebius.model.block.prenorm import PreNorm
from moebius.model.ends.hidden_z import HiddenZ
from moebius.model.ends.mtp import MTP
from moebius.model.ffn.balance import BalanceConfig
from moebius.model.ffn.balance.budget import Budget
from moebius.model.ffn.balance.group import GroupLoss
from moebius.model.ffn.balance.sign import Sign
from moebius.model.ffn.balance.switch import SwitchLoss
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.sigmoid import Sigmoid
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.mla import MLA
from moebius.model.rope import NTKAlpha, YaRN
from moebius.recipes.deepseek import deepseek_v3, moonlight

from .families import check_fused
from .families import refused as refused_by
from .parity import (
    FORWARD,
    Twin,
    check_all,
    check_bf16,
    check_export,
    check_forward,
    check_fresh,
    check_greedy,
    fresh_run,
    model_of,
    our_logits,
    relative,
    say,
    transformers,
)

pytestmark = pytest.mark.usefixtures("one_thread")
refused = partial(refused_by, DeepseekV3())

# Widths are multiples of 4: torch's grouped products, which the peer uses, take no others.
BASE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 40,
    "intermediate_size": 28,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 7,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 128,
    # Or a token would end the peer's greedy decoding.
    "eos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
CASES: dict[str, dict[str, Any]] = {
    "groups, as published": {},
    "moonlight: plain queries, no groups, 2 shared": {
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
        "rms_norm_eps": 1e-5,
    },
    "biases, yarn, tied": {
        "attention_bias": True,
        "rope_parameters": YARN,
        "tie_word_embeddings": True,
    },
    "top 12 of 4 groups, not renormalised, no dense layer": {
        "n_routed_experts": 24,
        "num_experts_per_tok": 12,
        "n_group": 4,
        "topk_group": 3,
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
        "num_hidden_layers": 2,
    },
    "top 1, not renormalised": {"num_experts_per_tok": 1, "norm_topk_prob": False},
}


def config(**changes: Any) -> Any:
    return transformers.DeepseekV3Config(**{**BASE, **changes})


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_import_and_export_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_all(Twin(config(**changes), tmp_path))


def test_a_renormalised_choice_of_one_is_the_same(tmp_path: Path) -> None:
    """Its weight is 1, so the router's gradient is 0 here, and rounding alone in the peer's."""
    twin = Twin(config(num_experts_per_tok=1, routed_scaling_factor=1.7), tmp_path)
    check_forward(twin)
    check_greedy(twin)
    check_export(twin)


@pytest.mark.parametrize("pinned", [False, True])
def test_bf16_is_as_near_as_transformers_to_itself(tmp_path: Path, pinned: bool) -> None:
    wide = {"hidden_size": 64, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    twin = Twin(config(**wide), tmp_path)
    if pinned:
        # Biases that outweigh any score, so that no rounding moves a selection.
        twin.peer.model.layers[1].mlp.gate.e_score_correction_bias.mul_(100)
    check_bf16(twin)


def test_fused_experts_are_read(tmp_path: Path) -> None:
    check_fused(Twin(config(), tmp_path))


def test_published_prediction_layers_are_left_out_and_counted(tmp_path: Path) -> None:
    twin = Twin(config(num_nextn_predict_layers=1), tmp_path)
    path = twin.folder / "model.safetensors"
    tensors = load_file(path)
    layer = {x.replace("layers.2.", "layers.3."): tensors[x] for x in tensors if "layers.2." in x}
    layer |= {
        f"model.layers.3.{name}.weight": torch.zeros(40)
        for name in ("enorm", "hnorm", "eh_proj", "embed_tokens", "shared_head.norm")
    }
    save_file(tensors | {x: y.clone() for x, y in layer.items()}, path, {"format": "pt"})
    said: list[str] = []
    import_hf(twin.folder, tmp_path / "counted", say=said.append)
    assert f"left out {len(layer)} tensor(s): multi-token prediction" in " ".join(said)
    check_forward(twin)
    save_file(tensors | {"model.layers.3.odd": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.3\.odd is not a tensor of such a model"):
        import_hf(twin.folder, tmp_path / "other", say=say)


READ_ODD = {
    "rope_interleave": False,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "moe_layer_freq": 2,
    "head_dim": 8,
    "num_key_value_heads": 1,
    "hidden_act": "gelu",
    "attn_output_gate": True,
}


@pytest.mark.parametrize(("key", "value"), READ_ODD.items(), ids=READ_ODD)
def test_what_a_config_may_not_say_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    twin = Twin(config(), tmp_path)
    path = twin.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=key):
        import_hf(twin.folder, tmp_path / "run", say=say)
    assert not (tmp_path / "run").exists()


PUBLISHED: dict[str, Any] = {
    "attention_bias": False,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163_840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10_000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129_280,
}
MOONLIGHT: dict[str, Any] = PUBLISHED | {
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11_264,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 50_000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163_840,
}


@pytest.mark.parametrize(
    ("published", "recipe"), [(PUBLISHED, deepseek_v3), (MOONLIGHT, moonlight)]
)
def test_published_configs_are_the_recipes(published: dict[str, Any], recipe: Any) -> None:
    keys = Keys(published)
    read = DeepseekV3().read_config(keys)
    keys.finish(HARMLESS | DeepseekV3.harmless)
    run = recipe()
    assert read.vocab == run.vocab
    # The recipe has a loss beside the bias; it only trains.
    k = published["first_k_dense_replace"]
    changes = [f"layers.{i}.ffn.balance=[]" for i in range(k, len(run.model.layers))]
    assert override(read.model, changes) == override(run.model, changes)


# --- models of our own ----------------------------------------------------------------------------

MIXER = MLA(3, 14, 10, 8, 6, 7, rope_base=900.0, rope_scaling=YaRN(4.0, 32))
MOE = MoE(
    experts=6,
    expert_width=12,
    top_k=2,
    shared_experts=1,
    scaling=1.5,
    split=2.0,
    router=Sigmoid(renormalise=True),
    balance=(Sign(), SwitchLoss()),
)


def model(mixer: MLA = MIXER, moe: MoE = MOE, **more: Any) -> ModelConfig:
    first, layer = PreNorm(mixer, Dense(20)), PreNorm(mixer, moe)
    return ModelConfig(width=32, layers=(first, layer, layer), **more)


@pytest.mark.parametrize(
    ("balance", "tied", "bias"),
    [
        ((Sign(), SwitchLoss()), True, True),
        ((GroupLoss(), Budget()), False, False),
        ((GroupLoss(),), False, True),
    ],
)
def test_a_model_of_ours_runs_in_transformers(
    tmp_path: Path, balance: tuple[BalanceConfig, ...], tied: bool, bias: bool
) -> None:
    moe = dataclasses.replace(MOE, balance=balance)
    mixer = dataclasses.replace(MIXER, bias=bias)
    out = check_fresh(model(mixer, moe, tied=tied, ends=(HiddenZ(),)), 300, tmp_path)
    found = json.loads((out / "config.json").read_text())
    assert found["routed_scaling_factor"] == 3.0 and found["num_nextn_predict_layers"] == 0
    layer = model_of(tmp_path / "back-transformers").layers[1]
    assert isinstance(layer, PreNorm) and isinstance(layer.ffn, MoE)
    assert layer.ffn.balance == (Sign(),)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_without_shared_experts_transformers_finds_empty_ones(tmp_path: Path) -> None:
    out = check_fresh(model(moe=dataclasses.replace(MOE, shared_experts=0)), 300, tmp_path)
    name = "model.layers.1.mlp.shared_experts.down_proj.weight"
    assert load_file(out / "model.safetensors")[name].shape == (32, 0)


@pytest.mark.parametrize("target", ["vllm", "sglang"])
@pytest.mark.parametrize("shared", [0, 1])
def test_servers_get_what_they_ask_for(tmp_path: Path, target: Target, shared: int) -> None:
    ours = model(moe=dataclasses.replace(MOE, shared_experts=shared), tied=True)
    run, lm = fresh_run(ours, 300, tmp_path / "run")
    out = export_hf(run, tmp_path / "out", target=target, say=say)
    found = json.loads((out / "config.json").read_text())
    expected = {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_shared_experts": shared or None,
        "rope_interleave": True,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0,
    }
    assert found | expected == found
    assert "lm_head.weight" in load_file(out / "model.safetensors")
    back = load(import_hf(out, tmp_path / "back", say=say))[0].lm
    tokens_BT = torch.arange(20)[None]
    with torch.no_grad():
        expected_BTV = our_logits(lm, tokens_BT)
        assert relative(our_logits(back, tokens_BT), expected_BTV) < FORWARD


def test_what_only_trains_is_left_out_by_name(tmp_path: Path) -> None:
    run, lm = fresh_run(model(ends=(MTP(MIXER, Dense(8)),)), 300, tmp_path / "run")
    said: list[str] = []
    out = export_hf(run, tmp_path / "out", say=said.append)
    left = [text for text in said if text.startswith("left out")]
    own = [name for name in lm.state_dict() if name[:4] == "ends" or name.endswith("load")]
    assert len(left) == len(own) > 10
    assert all(any(name in text for text in left) for name in own)
    assert not any("mtp" in name for name in load_file(out / "model.safetensors"))


CANNOT: dict[str, list[str]] = {
    "mixer.scale_correction: it has none": ["mixer.scale_correction=true"],
    "mixer.rope_base: it always rotates": ["mixer.rope_base=none"],
    "mixer.latent_eps: must be 1e-06": ["mixer.latent_eps=1e-4"],
    "ffn.zero_experts: it has none": ["ffn.zero_experts=2", "ffn.ffn_per_token=1.0"],
    "ffn.router is softmax; it has only sigmoid": ["ffn.router=softmax"],
    "ffn.router.num_groups: it scores a group by its two best": ["ffn.router.num_groups=6"],
    "ffn.bias: its experts have none": ["ffn.bias=true"],
    "ffn.balance: 2 rules hold a selection bias": ['ffn.balance=["sign", "budget"]'],
}


@pytest.mark.parametrize(("reason", "changes"), CANNOT.items(), ids=CANNOT)
def test_what_it_cannot_hold_is_refused(reason: str, changes: list[str]) -> None:
    layer = override(PreNorm(MIXER, MOE), changes)
    refused(dataclasses.replace(model(), layers=2 * (layer,)), f"layers.*.{reason}")


def test_other_orders_and_parts_are_refused() -> None:
    first, layer = model().layers[:2]
    refused(dataclasses.replace(model(), layers=(layer, first)), "come before all mixtures")
    refused(dataclasses.replace(model(), layers=(first,)), "needs a mixture of experts")
    other = PreNorm(GQA(4, 2, 8), MOE)
    refused(dataclasses.replace(model(), layers=(first, other)), "gqa where it has only mla")
    unlike = PreNorm(MIXER, dataclasses.replace(MOE, top_k=3))
    refused(dataclasses.replace(model(), layers=(layer, unlike)), "(moe): all must be alike")


def test_servers_refuse_more() -> None:
    biased = model(dataclasses.replace(MIXER, bias=True))
    refused(biased, "layers.*.mixer.bias: vllm has none here", "vllm")
    cut = dataclasses.replace(MIXER, rope_scaling=YaRN(4.0, 32, truncate=False))
    refused(model(cut), "neither attention_factor nor truncate", "sglang")
    alpha = model(dataclasses.replace(MIXER, rope_scaling=NTKAlpha(4.0)))
    refused(alpha, "it does not know this one")
