"""Recipes of published size against transformers' own classes; the figures that sources print are
compared in `tests/lab/test_plan.py`.
"""

from typing import Any

import pytest
import torch

from moebius.model.count import count_config
from moebius.recipes import recipe

FULL = [4, 8, 12, 16, 20, 24, 27]
# What the configs published with the checkpoints say where it is not their class's default.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v3": ("DeepseekV3Config", {}),
    "moonlight-16b-a3b": (
        "DeepseekV3Config",
        {
            "vocab_size": 163_840,
            "hidden_size": 2048,
            "intermediate_size": 11_264,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
        },
    ),
    "qwen3-30b-a3b": ("Qwen3MoeConfig", {"num_hidden_layers": 48, "head_dim": 128}),
    "olmoe-1b-7b": ("OlmoeConfig", {"intermediate_size": 1024}),
    # The class's default has a full layer less than the released model and its paper.
    "kimi-linear-48b-a3b": (
        "KimiLinearConfig",
        {
            "linear_attn_config": {
                "full_attn_layers": FULL,
                "kda_layers": [i for i in range(1, 28) if i not in FULL],
            }
        },
    ),
    "llama3-8b": (
        "LlamaConfig",
        {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_parameters_are_those_of_transformers_own_class(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the peer needs transformers")
    kind, options = PEERS[name]
    with torch.device("meta"):
        config = getattr(transformers, kind)(**options)
        peer = transformers.AutoModelForCausalLM.from_config(config)
    run = recipe(name)
    total = count_config(run.model, run.vocab, 8).total
    assert total == sum(weight.numel() for weight in peer.parameters())
    # What else it holds is no weight: the balance bias of each router, and rotary frequencies.
    kept = {name.split(".")[-1] for name, _ in peer.named_buffers()}
    assert kept <= {"e_score_correction_bias", "inv_freq", "original_inv_freq"}
