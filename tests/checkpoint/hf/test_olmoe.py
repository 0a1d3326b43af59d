"""OLMoE equals transformers' own class, both ways; what it cannot hold is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from moebius.checkpoint.hf import Target
from moebius.checkpoint.hf.olmoe import OLMoE
from moebius.config import override
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.balance.budget import Budget
from moebius.model.ffn.balance.router_z import RouterZ
from moebius.model.ffn.balance.switch import SwitchLoss
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.swa import SWA
from moebius.model.rope import Linear

from .families import check_fused, check_published, check_unread, refused, spelt
from .parity import Twin, check_all, check_export, check_forward, check_fresh, transformers
from .pinned import check_bf16_pinned

pytestmark = pytest.mark.usefixtures("one_thread")

# Widths are multiples of 4: torch's grouped products, which the peer uses, take no others.
BASE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    # Or a token would end the peer's greedy decoding.
    "eos_token_id": None,
}
CASES: dict[str, dict[str, Any]] = {
    "groups of 1": {},
    "groups of 3, biases, top 1": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "num_experts_per_tok": 1,
    },
    "groups of 8, tied, top 12, renormalised": {
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_experts": 16,
        "num_experts_per_tok": 12,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 900.0, "factor": 4.0},
    },
    "16 heads of 4": {
        "hidden_size": 64,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
}


def config(**changes: Any) -> Any:
    return transformers.OlmoeConfig(**{**BASE, **changes})


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_import_and_export_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_all(Twin(config(**changes), tmp_path))


def test_bf16_is_as_near_as_transformers_to_itself(tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 48, "num_hidden_layers": 3}
    more = {"num_experts": 16, "num_experts_per_tok": 8}
    check_bf16_pinned(Twin(config(**sizes, **more), tmp_path, seed=1), "mlp.gate")


def test_fused_experts_are_read_too(tmp_path: Path) -> None:
    check_fused(Twin(config(), tmp_path))


# What AllenAI published, but for ids of tokens.
PUBLISHED = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 50304,
}


def test_a_published_config_is_read() -> None:
    check_published(OLMoE(), PUBLISHED, 6_919_161_856)


def test_the_published_spelling_means_the_same(tmp_path: Path) -> None:
    twin = Twin(config(rope_parameters={"rope_type": "default", "rope_theta": 300.0}), tmp_path)
    older = {"rope_theta": 300.0, "rope_scaling": None, "torch_dtype": "float32"}
    spelt(twin.folder, ("rope_parameters", "dtype"), **older)
    check_forward(twin)
    check_export(twin)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"clip_qkv": 8.0}, "queries, keys and values are not clipped here"),
        ({"num_attention_heads": 7}, "7 heads do not divide hidden_size, 48"),
        ({"head_dim": 10}, "heads share hidden_size among them"),
        ({"sliding_window": 8}, "'sliding_window' is not a key we know"),
        ({"num_local_experts": 6}, "num_experts and num_local_experts are one number"),
    ],
)
def test_configs_that_mean_something_else_are_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    check_unread(Twin(config(num_hidden_layers=1), tmp_path), changes, reason)


# --- models of our own ----------------------------------------------------------------------------

MIXER = GQA(heads=4, kv_heads=4, head_width=8, rope_base=5000.0, qk_norm="full")
MOE = MoE(
    experts=4, expert_width=12, top_k=2, balance=(SwitchLoss(0.01, scope="sequence"), RouterZ())
)


def model(mixer: Any = MIXER, moe: Any = MOE, **more: Any) -> ModelConfig:
    return ModelConfig(width=32, layers=2 * (PreNorm(mixer, moe),), **more)


@pytest.mark.parametrize("target", ["transformers", "vllm", "sglang"])
def test_a_model_of_ours_runs_in_transformers(tmp_path: Path, target: Target) -> None:
    ours = model(dataclasses.replace(MIXER, rope_scaling=Linear(3.0)), tied=True)
    out = check_fresh(ours, 300, tmp_path, target)
    found = json.loads((out / "config.json").read_text())
    # Ours scales a tied embedding by sqrt(D), theirs does not: it leaves as two tensors.
    assert found["tie_word_embeddings"] is False and found["clip_qkv"] is None
    assert found["norm_topk_prob"] is False


CANNOT: dict[str, ModelConfig] = {
    "layers.*.mixer is swa": model(
        SWA(heads=4, kv_heads=4, head_width=8, window=4, qk_norm="full")
    ),
    "layers.*.ffn is dense": model(moe=Dense(20)),
    "layers.*.ffn.balance: a rule holds a selection bias": model(
        moe=dataclasses.replace(MOE, balance=(SwitchLoss(), Budget()))
    ),
    "layers.*.ffn.bias: its experts never have": model(moe=dataclasses.replace(MOE, bias=True)),
    "layers.*.mixer.qk_norm: it has only QK-norm 'full'": model(override(MIXER, ["qk_norm=head"])),
    "layers.*.mixer.head_width: its heads share the width, 32": model(
        override(MIXER, ["head_width=10"])
    ),
}


@pytest.mark.parametrize(("reason", "ours"), CANNOT.items(), ids=CANNOT)
def test_what_olmoe_cannot_hold_is_refused(reason: str, ours: ModelConfig) -> None:
    refused(OLMoE(), ours, reason, "transformers")


def test_what_servers_do_not_read_is_refused() -> None:
    odd = model(
        dataclasses.replace(MIXER, kv_heads=2, bias=True),
        dataclasses.replace(MOE, router=Softmax(renormalise=True)),
        norm_eps=1e-6,
    )
    for target in ("vllm", "sglang"):
        refused(OLMoE(), odd, f"layers.*.mixer.bias: {target} has none", target)
        refused(OLMoE(), odd, f"norm_eps: {target} always takes 1e-05", target)
        refused(OLMoE(), odd, f"router.renormalise: {target} never divides", target)
    refused(OLMoE(), odd, "layers.*.mixer.kv_heads: sglang norms keys", "sglang")
