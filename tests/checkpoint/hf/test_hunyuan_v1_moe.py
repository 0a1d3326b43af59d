"""Hunyuan's mixture equals transformers' own class, both ways; the rest is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.checkpoint.hf import Target
from moebius.checkpoint.hf.exporter import export_hf
from moebius.checkpoint.hf.folder import open_folder
from moebius.checkpoint.hf.hunyuan_v1_moe import HunYuanMoEV1
from moebius.config import override
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.balance.switch import SwitchLoss
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import ModelConfig
from moebius.model.mixers.cla import shared
from moebius.model.mixers.gqa import GQA
from moebius.model.rope import NTKAlpha

from .families import check_fused, check_published, check_unread, refused, spelt
from .parity import (
    FORWARD,
    Twin,
    check_all,
    check_export,
    check_forward,
    check_fresh,
    check_greedy,
    fresh_run,
    peer_of,
    relative,
    say,
    transformers,
)
from .pinned import check_bf16_pinned

pytestmark = pytest.mark.usefixtures("one_thread")

# Widths are multiples of 4: torch's grouped products, which the peer uses, take no others.
BASE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 40,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_experts": 5,
    "moe_topk": 2,
    "max_position_embeddings": 128,
    # Or a token would end the peer's greedy decoding.
    "eos_token_id": None,
}
ALPHA = {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0}
CASES: dict[str, dict[str, Any]] = {
    "groups of 3, alpha": {"rope_parameters": ALPHA},
    "groups of 1, biases, a list of top k": {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 14,
        "attention_bias": True,
        "moe_topk": [3, 2],
    },
    "groups of 8, tied, top 12": {
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "num_experts": 16,
        "moe_topk": 12,
        "tie_word_embeddings": True,
    },
}


def config(**changes: Any) -> Any:
    return transformers.HunYuanMoEV1Config(**{**BASE, **changes})


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_import_and_export_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_all(Twin(config(**changes), tmp_path))


def test_one_expert_runs_and_does_not_train(tmp_path: Path) -> None:
    twin = Twin(config(moe_topk=1), tmp_path)
    check_forward(twin)
    check_greedy(twin)
    check_export(twin)
    with pytest.raises(ValueError, match="no router gradient"):
        twin.lm.check_trainable()


def test_bf16_is_as_near_as_transformers_to_itself(tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 48, "head_dim": 16, "num_hidden_layers": 3}
    more = {"num_experts": 16, "moe_topk": 8}
    check_bf16_pinned(Twin(config(**sizes, **more), tmp_path, seed=1), "mlp.gate")


def test_fused_experts_are_read_too(tmp_path: Path) -> None:
    check_fused(Twin(config(), tmp_path))


# What Tencent published as Hunyuan-A13B, but for ids of tokens.
PUBLISHED: dict[str, Any] = {
    "add_classification_head": False,
    "architectures": ["HunYuanMoEV1ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_head_dim": 128,
    "cla_share_factor": 2,
    "class_num": 0,
    "dense_list": [4096, 0],
    "group_limited_greedy": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "kv_lora_rank": None,
    "mask_init_id": 12,
    "max_position_embeddings": 32768,
    "mlp_bias": False,
    "model_type": "hunyuan_v1_moe",
    "moe_drop_tokens": False,
    "moe_intermediate_size": 32 * [3072],
    "moe_layer_num_skipped": 0,
    "moe_random_routing_dropped_token": False,
    "moe_topk": 32 * [8],
    "norm_topk_prob": True,
    "norm_type": "rms",
    "num_attention_heads": 32,
    "num_experts": 64,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_media_embeds": 257,
    "num_shared_expert": 32 * [1],
    "org_vocab_size": 128167,
    "pool_type": "last",
    "position_embedding_xdrope": False,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": None,
    "qk_rope_head_dim": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "alpha": 1000.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "type": "dynamic",
    },
    "rope_theta": 10000.0,
    "routed_scaling_factor": False,
    "skip_cls_token": False,
    "tie_word_embeddings": True,
    "topk_group": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_cla": False,
    "use_mixed_mlp_moe": True,
    "use_mla": False,
    "use_qk_norm": True,
    "use_rotary_pos_emb": True,
    "v_head_dim": None,
    "vocab_size": 128167,
}


def test_a_published_config_is_read() -> None:
    layer = check_published(HunYuanMoEV1(), PUBLISHED, 80_393_183_232).model.layers[31]
    assert isinstance(layer, PreNorm) and isinstance(layer.mixer, GQA)
    assert layer.mixer.rope_scaling == NTKAlpha(1000.0) and layer.mixer.head_width == 128


def test_the_published_spelling_means_the_same(tmp_path: Path) -> None:
    twin = Twin(config(rope_parameters=ALPHA), tmp_path)
    spelt(
        twin.folder,
        ("rope_parameters", "dtype"),
        rope_theta=100.0,
        rope_scaling={"type": "dynamic", "alpha": 50.0, "factor": 1.0, "mscale": 1.0},
        torch_dtype="float32",
        moe_topk=[2, 2],
        moe_intermediate_size=[12, 12],
        num_shared_expert=[1, 1],
        attention_head_dim=10,
        use_cla=False,
        cla_share_factor=2,
    )
    check_forward(twin)
    check_export(twin)


def test_an_export_writes_the_keys_that_transformers_fails_without(tmp_path: Path) -> None:
    twin = Twin(config(), tmp_path)
    spelt(twin.folder, ("head_dim",), attention_head_dim=10, num_experts=[5, 5])
    out = export_hf(twin.run, tmp_path / "out", say=say)
    with torch.no_grad():
        found = peer_of(out)(twin.tokens_BT).logits
        assert relative(found, twin.peer(twin.tokens_BT).logits) < FORWARD


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_cla": True}, "this class has keys and values in every layer"),
        ({"num_experts": [5, 4]}, "num_experts must be the same in all layers"),
        ({"moe_topk": [2]}, "moe_topk must be 2 whole numbers"),
        ({"moe_intermediate_size": [12, 16]}, "moe_intermediate_size must be 12: every expert"),
        ({"num_shared_expert": 2}, "num_shared_expert must be 1: every layer"),
        ({"attention_head_dim": 12}, "head_dim and attention_head_dim are one number"),
        ({"use_mixed_mlp_moe": False}, "always has a shared expert"),
        ({"moe_drop_tokens": True}, "this class drops no tokens"),
        ({"routed_scaling_factor": 2.5}, "does not scale the routed sum"),
        ({"norm_topk_prob": False}, "renormalises the selected weights"),
        ({"moe_layer_num_skipped": 1}, "has no dense layers"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' without alpha"),
    ],
)
def test_configs_that_mean_something_else_are_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    check_unread(Twin(config(), tmp_path), changes, reason)


# --- models of our own ----------------------------------------------------------------------------

MIXER = GQA(heads=6, kv_heads=2, head_width=10, rope_base=500.0, qk_norm="head_after_rope")
MOE = MoE(
    experts=4,
    expert_width=12,
    top_k=2,
    shared_experts=1,
    router=Softmax(renormalise=True),
    balance=(SwitchLoss(0.01),),
)


def model(mixer: Any = MIXER, moe: Any = MOE, **more: Any) -> ModelConfig:
    return ModelConfig(width=32, layers=2 * (PreNorm(mixer, moe),), **more)


@pytest.mark.parametrize("target", ["transformers", "vllm", "sglang"])
def test_a_model_of_ours_runs_in_transformers(tmp_path: Path, target: Target) -> None:
    mixer = dataclasses.replace(MIXER, rope_scaling=NTKAlpha(20.0))
    layers = (PreNorm(mixer, MOE), PreNorm(mixer, dataclasses.replace(MOE, top_k=3)))
    ours = ModelConfig(32, layers, tied=True, embedding_scale=1.0)
    out = check_fresh(ours, 300, tmp_path, target)
    found = json.loads((out / "config.json").read_text())
    needed = {"num_shared_expert": 1, "use_mixed_mlp_moe": True, "use_qk_norm": True}
    assert found["moe_topk"] == [2, 3] and found["tie_word_embeddings"] is True
    assert found.items() >= (needed | {"moe_intermediate_size": 12, "head_dim": 10}).items()


def test_routers_stay_in_fp32(tmp_path: Path) -> None:
    run, _ = fresh_run(model(), 300, tmp_path / "run")
    found = open_folder(export_hf(run, tmp_path / "out", dtype="bf16", say=say)).tensors
    kept = {name for name, x in found.items() if x.dtype == torch.float32}
    assert kept == {f"model.layers.{i}.mlp.gate.wg.weight" for i in range(2)}


LARGE = ModelConfig(32, tuple(PreNorm(mixer, MOE) for mixer in shared(MIXER, 2)))
CANNOT: dict[str, ModelConfig] = {
    "layers.*.mixer: cla where it has only gqa": LARGE,
    "layers.*.ffn: dense where it has only moe": model(moe=Dense(20)),
    "layers.*.ffn.router.renormalise: it divides": model(
        moe=dataclasses.replace(MOE, top_k=1, router=Softmax())
    ),
    "layers.*.ffn.scaling: it does not scale": model(moe=dataclasses.replace(MOE, split=2.0)),
    "layers.*.ffn.shared_experts: it has 1": model(moe=dataclasses.replace(MOE, shared_experts=2)),
    "layers.*.mixer.qk_norm: it has only QK-norm 'head_after_rope'": model(
        override(MIXER, ["qk_norm=head"])
    ),
    "layers.*.ffn, but for top_k: all must be alike": dataclasses.replace(
        model(),
        layers=(PreNorm(MIXER, MOE), PreNorm(MIXER, dataclasses.replace(MOE, experts=5))),
    ),
}


@pytest.mark.parametrize(("reason", "ours"), CANNOT.items(), ids=CANNOT)
def test_what_the_class_cannot_hold_is_refused(reason: str, ours: ModelConfig) -> None:
    refused(HunYuanMoEV1(), ours, reason, "transformers")


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_one_expert_is_refused_for_servers(target: Target) -> None:
    ours = model(moe=dataclasses.replace(MOE, top_k=1))
    refused(HunYuanMoEV1(), ours, f"top_k: {target} does not renormalise", target)
