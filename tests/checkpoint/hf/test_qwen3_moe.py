"""Qwen3-MoE equals transformers' own class, both ways; what it cannot hold is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from moebius.checkpoint.hf import Target
from moebius.checkpoint.hf.qwen3_moe import Qwen3MoE
from moebius.config import override
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.balance.sign import Sign
from moebius.model.ffn.balance.switch import SwitchLoss
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import Clamp, MoE
from moebius.model.ffn.routers.sigmoid import Sigmoid
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import ModelConfig
from moebius.model.mixers.cla import CLA
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.swa import SWA
from moebius.model.rope import NTKAlpha, YaRN

from .families import check_fused, check_published, check_unread, refused, spelt
from .parity import (
    Twin,
    check_all,
    check_export,
    check_forward,
    check_fresh,
    check_greedy,
    transformers,
)
from .pinned import check_bf16_pinned

pytestmark = pytest.mark.usefixtures("one_thread")

# Widths are multiples of 4: torch's grouped products, which the peer uses, take no others.
BASE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 40,
    "intermediate_size": 28,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "groups of 3": {"norm_topk_prob": True},
    "groups of 1, biases, top 1": {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 14,
        "attention_bias": True,
        "num_experts_per_tok": 1,
    },
    "groups of 8, tied, top 12": {
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "num_experts": 16,
        "num_experts_per_tok": 12,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "dense layers by step and by name, llama3": {
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "rope_parameters": LLAMA3,
    },
    "a window, yarn": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "rope_parameters": YARN | {"original_max_position_embeddings": 32, "truncate": False},
    },
}


def config(**changes: Any) -> Any:
    return transformers.Qwen3MoeConfig(**{**BASE, **changes})


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_import_and_export_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_all(Twin(config(**changes), tmp_path))


def test_one_expert_renormalised_runs_and_does_not_train(tmp_path: Path) -> None:
    twin = Twin(config(num_experts_per_tok=1, norm_topk_prob=True), tmp_path)
    check_forward(twin)
    check_greedy(twin)
    check_export(twin)
    with pytest.raises(ValueError, match="no router gradient"):
        twin.lm.check_trainable()


def test_bf16_is_as_near_as_transformers_to_itself(tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "moe_intermediate_size": 32, "head_dim": 16, "num_experts": 16}
    more = {"num_experts_per_tok": 8, "num_hidden_layers": 3, "norm_topk_prob": True}
    check_bf16_pinned(Twin(config(**sizes, **more), tmp_path, seed=1), "mlp.gate")


def test_fused_experts_are_read_too(tmp_path: Path) -> None:
    check_fused(Twin(config(num_hidden_layers=2, mlp_only_layers=[0]), tmp_path))


# What Qwen published, but for ids of tokens.
PUBLISHED = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_a_published_config_is_read() -> None:
    found = check_published(Qwen3MoE(), PUBLISHED, 30_532_122_624).model.layers
    assert len(found) == 48 and len(set(found)) == 1
    assert isinstance(found[0], PreNorm) and isinstance(found[0].mixer, GQA)
    assert found[0].mixer.rope_base == 1e6


def test_the_published_spelling_means_the_same(tmp_path: Path) -> None:
    twin = Twin(config(rope_parameters={"rope_type": "default", "rope_theta": 300.0}), tmp_path)
    spelt(
        twin.folder,
        ("num_local_experts", "rope_parameters", "dtype"),
        num_experts=5,
        rope_theta=300.0,
        rope_scaling=None,
        torch_dtype="float32",
        max_window_layers=2,
    )
    check_forward(twin)
    check_export(twin)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_experts": 6}, "num_experts and num_local_experts are one number"),
        (
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "transformers lets all layers slide",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "alpha": 9.0, "rope_theta": 10.0}},
            "'dynamic' with alpha is Hunyuan's",
        ),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1"),
        ({"layer_types": ["full_attention"]}, "'layer_types' is not a key we know"),
        ({"hidden_act": "gelu"}, "the feed-forwards are SwiGLUs"),
    ],
)
def test_configs_that_mean_something_else_are_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    check_unread(Twin(config(num_hidden_layers=1), tmp_path), changes, reason)


# --- models of our own ----------------------------------------------------------------------------

MIXER = GQA(heads=6, kv_heads=2, head_width=10, rope_base=5000.0, qk_norm="head")
MOE = MoE(experts=4, expert_width=12, top_k=2, balance=(SwitchLoss(0.01),))


def model(mixer: Any = MIXER, moe: Any = MOE, **more: Any) -> ModelConfig:
    layers = (PreNorm(mixer, Dense(20)), PreNorm(mixer, moe))
    return ModelConfig(width=32, layers=layers, **more)


@pytest.mark.parametrize("target", ["transformers", "vllm", "sglang"])
def test_a_model_of_ours_runs_in_transformers(tmp_path: Path, target: Target) -> None:
    ours = model(dataclasses.replace(MIXER, rope_scaling=YaRN(4.0, 16)), tied=True)
    ours = dataclasses.replace(ours, embedding_scale=1.0)
    out = check_fresh(ours, 300, tmp_path, target)
    found = json.loads((out / "config.json").read_text())
    # Servers do not tie: they get the head as a tensor of its own.
    assert found["tie_word_embeddings"] is (target == "transformers")
    assert found["num_experts"] == found["num_local_experts"] == 4
    assert found["mlp_only_layers"] == [0] and found["rope_theta"] == 5000.0


CANNOT: dict[str, ModelConfig] = {
    "layers.*.mixer: cla where it has only gqa or swa": model(CLA(MIXER)),
    "layers.*.ffn.router is sigmoid": model(moe=dataclasses.replace(MOE, router=Sigmoid())),
    "layers.*.ffn.balance: a rule holds a selection bias": model(
        moe=dataclasses.replace(MOE, balance=(Sign(),))
    ),
    "layers.*.ffn.scaling: it does not scale": model(moe=dataclasses.replace(MOE, scaling=2.0)),
    "layers.*.ffn.shared_experts: it has none": model(
        moe=dataclasses.replace(MOE, shared_experts=1)
    ),
    "layers.*.ffn.zero_experts: it has none": model(
        moe=dataclasses.replace(MOE, zero_experts=1, ffn_per_token=1.5)
    ),
    "layers.*.ffn.clamp: its experts are plain": model(moe=dataclasses.replace(MOE, clamp=Clamp())),
    "layers.*.ffn.router.num_groups: it selects among all": model(
        moe=dataclasses.replace(MOE, router=Softmax(num_groups=2))
    ),
    "layers.*.ffn.router.bias: it has none": model(
        moe=dataclasses.replace(MOE, router=Softmax(bias=True))
    ),
    "layers.*.ffn: it needs a mixture of experts": model(moe=Dense(20)),
    "layers.*.mixer.rope_scaling: only Hunyuan has ntk_alpha": model(
        dataclasses.replace(MIXER, rope_scaling=NTKAlpha(9.0))
    ),
    "layers.*.mixer.qk_norm: it has only QK-norm 'head'": model(override(MIXER, ["qk_norm=none"])),
    "layers.*.mixer.sinks: it has none": model(override(MIXER, ["sinks=true"])),
    "layers.*.mixer.rope_base: it always rotates": model(override(MIXER, ["rope_base=none"])),
}


@pytest.mark.parametrize(("reason", "ours"), CANNOT.items(), ids=CANNOT)
def test_what_qwen3_moe_cannot_hold_is_refused(reason: str, ours: ModelConfig) -> None:
    refused(Qwen3MoE(), ours, reason, "transformers")


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_what_servers_leave_out_is_refused(target: Target) -> None:
    window = SWA(heads=6, kv_heads=2, head_width=10, window=4, qk_norm="head", bias=True)
    refused(Qwen3MoE(), model(window), f"bias: {target} has none on the output", target)
    refused(Qwen3MoE(), model(window), f"mixer: {target} has no window here", target)
    scaled = dataclasses.replace(MIXER, rope_scaling=YaRN(4.0, 16, attention_factor=1.2))
    refused(Qwen3MoE(), model(scaled), f"{target} has neither attention_factor", target)
