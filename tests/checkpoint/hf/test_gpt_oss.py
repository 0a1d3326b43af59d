"""gpt-oss equals transformers' own class, both ways; what it cannot hold is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moebius.checkpoint.hf import Target
from moebius.checkpoint.hf.exporter import export_hf
from moebius.checkpoint.hf.gpt_oss import GptOss
from moebius.checkpoint.hf.importer import import_hf
from moebius.config import override
from moebius.infer.load import load
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.balance.switch import SwitchLoss
from moebius.model.ffn.moe import Clamp, MoE
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.swa import SWA
from moebius.model.rope import Linear, YaRN

from .families import check_published, check_unread, refused, spelt
from .parity import (
    FORWARD,
    Twin,
    check_all,
    check_export,
    check_forward,
    check_fresh,
    our_logits,
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
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "max_position_embeddings": 128,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
}
CASES: dict[str, dict[str, Any]] = {
    "groups of 3": {},
    "groups of 1, no biases in attention, top 1": {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 14,
        "attention_bias": False,
        "num_experts_per_tok": 1,
        "swiglu_alpha": 1.1,
        "swiglu_limit": 0.5,
    },
    "groups of 8, tied, top 12, full first": {
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "num_local_experts": 16,
        "num_experts_per_tok": 12,
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 900.0},
        "tie_word_embeddings": True,
    },
}


def config(**changes: Any) -> Any:
    return transformers.GptOssConfig(**{**BASE, **changes})


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_import_and_export_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_all(Twin(config(**changes), tmp_path))


def test_bf16_is_as_near_as_transformers_to_itself(tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 48, "head_dim": 16, "num_hidden_layers": 3}
    more = {"num_local_experts": 16, "num_experts_per_tok": 8}
    twin = Twin(config(**sizes, **more), tmp_path, seed=1)
    check_bf16_pinned(twin, "mlp.router", fused=False)


@pytest.mark.parametrize("window", [1, 4, 6])
def test_the_window_counts_the_token_itself(tmp_path: Path, window: int) -> None:
    twin = Twin(config(sliding_window=window), tmp_path)
    check_forward(twin)
    with torch.no_grad():
        expected = twin.peer(twin.tokens_BT).logits
        for other in (window - 1, window + 1):
            if other > 0:
                first = dataclasses.replace(twin.lm.config.layers[0])
                assert isinstance(first, PreNorm) and isinstance(first.mixer, SWA)
                mixer = dataclasses.replace(first.mixer, window=other)
                layers = (dataclasses.replace(first, mixer=mixer), *twin.lm.config.layers[1:])
                near = dataclasses.replace(twin.lm.config, layers=layers).build(twin.lm.vocab)
                near.load_state_dict(twin.lm.state_dict())
                assert relative(our_logits(near, twin.tokens_BT), expected) > 100 * FORWARD


def quantised(folder: Path, out: Path) -> Path:
    """The folder with experts of random MXFP4, the rest in bf16, as published."""
    out.mkdir()
    generator, tensors = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    for name, x in load_file(folder / "model.safetensors").items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            experts, inputs, rows = x.shape
            shape, byte = (experts, rows, inputs // 32), torch.uint8
            blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=byte)
            scales = torch.randint(121, 126, shape, generator=generator, dtype=byte)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            tensors[name] = x.bfloat16()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    how = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    found = json.loads((folder / "config.json").read_text())
    found |= {"quantization_config": how, "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(found))
    return out


def test_published_mxfp4_is_read(tmp_path: Path) -> None:
    twin = Twin(config(hidden_size=64, intermediate_size=32), tmp_path)
    folder = quantised(twin.folder, tmp_path / "quantised")
    run = import_hf(folder, tmp_path / "from-quantised", say=say)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        attn_implementation="eager",
        dtype=torch.bfloat16,
    )
    out = export_hf(run, tmp_path / "plain", say=say)
    with torch.no_grad():
        expected = peer.float().eval()(twin.tokens_BT).logits
        assert relative(our_logits(load(run)[0].lm.float(), twin.tokens_BT), expected) < FORWARD
        assert relative(peer_of(out)(twin.tokens_BT).logits, expected) < FORWARD
    found = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in found and found["dtype"] == "bfloat16"


# What OpenAI published as gpt-oss-20b, but for ids of tokens.
PUBLISHED: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": 12 * ["sliding_attention", "full_attention"],
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}


def test_a_published_config_is_read() -> None:
    found = check_published(GptOss(), PUBLISHED, 20_914_757_184)
    bare = {
        key: x
        for key, x in PUBLISHED.items()
        if key not in ("rope_scaling", "rope_theta", "layer_types", "swiglu_limit", "head_dim")
    }
    assert check_published(GptOss(), bare, 20_914_757_184) == found


def test_the_published_spelling_means_the_same(tmp_path: Path) -> None:
    twin = Twin(config(), tmp_path)
    inside = dict(BASE["rope_parameters"])
    base = inside.pop("rope_theta")
    older = {"rope_theta": base, "rope_scaling": inside, "experts_per_token": 2}
    spelt(twin.folder, ("rope_parameters", "swiglu_alpha"), **older)
    check_forward(twin)
    check_export(twin)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ["full_attention"]}, "for each of the 2 layers"),
        ({"layer_types": 2 * ["chunked_attention"]}, "layer_types must say sliding_attention or"),
        ({"experts_per_token": 3}, "num_experts_per_tok and experts_per_token are one number"),
        ({"num_experts": 6}, "num_local_experts and num_experts are one number"),
        ({"hidden_act_alpha": 2.0}, "swiglu_alpha is 1.702"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised by 'awq' cannot be read"),
    ],
)
def test_configs_that_mean_something_else_are_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    check_unread(Twin(config(), tmp_path), changes, reason)


# --- models of our own ----------------------------------------------------------------------------

SCALED = YaRN(factor=4.0, original_length=16, truncate=False)
FULL = GQA(6, 2, 10, rope_base=5000.0, rope_scaling=SCALED, bias=True, sinks=True)
SLIDING = SWA(6, 2, 10, 5, rope_base=5000.0, rope_scaling=SCALED, bias=True, sinks=True)
MOE = MoE(
    experts=4,
    expert_width=12,
    top_k=2,
    router=Softmax(renormalise=True, bias=True),
    balance=(SwitchLoss(0.01),),
    bias=True,
    clamp=Clamp(),
)


def model(
    mixers: tuple[GQA | SWA, ...] = (SLIDING, FULL), moe: MoE = MOE, **more: Any
) -> ModelConfig:
    return ModelConfig(width=32, layers=tuple(PreNorm(mixer, moe) for mixer in mixers), **more)


@pytest.mark.parametrize("target", ["transformers", "vllm", "sglang"])
def test_a_model_of_ours_runs_in_transformers(tmp_path: Path, target: Target) -> None:
    out = check_fresh(model(tied=True, embedding_scale=1.0), 300, tmp_path, target)
    found = json.loads((out / "config.json").read_text())
    assert found["tie_word_embeddings"] is (target == "transformers")
    assert found["layer_types"] == ["sliding_attention", "full_attention"]
    assert found["hidden_act_alpha"] == found["swiglu_alpha"] == 1.702


def test_a_model_that_never_slides_runs_in_transformers(tmp_path: Path) -> None:
    full = dataclasses.replace(FULL, rope_scaling=Linear(2.0), bias=False)
    check_fresh(model((full, full), override(MOE, ["clamp.limit=0.5"])), 300, tmp_path)


CANNOT: dict[str, ModelConfig] = {
    "layers.*.mixer.sinks: it has them in every layer": model(
        (override(SLIDING, ["sinks=false"]), override(FULL, ["sinks=false"]))
    ),
    "layers.*.mixer, but for the window: all must be alike": model(
        (SLIDING, override(FULL, ["rope_base=900"]))
    ),
    "layers.*.mixer (swa): all must be alike": model((SLIDING, override(SLIDING, ["window=6"]))),
    "layers.*.mixer.qk_norm: it has no QK-norm": model((override(FULL, ["qk_norm=head"]),)),
    "layers.*.ffn.clamp: its experts are clamped": model(moe=override(MOE, ["clamp=none"])),
    "layers.*.ffn.bias: its experts always have": model(moe=override(MOE, ["bias=false"])),
    "layers.*.ffn.router.bias: it always has one": model(
        moe=dataclasses.replace(MOE, router=Softmax(renormalise=True))
    ),
    "layers.*.ffn.router.renormalise: its weights are a softmax": model(
        moe=dataclasses.replace(MOE, router=Softmax(bias=True))
    ),
}


@pytest.mark.parametrize(("reason", "ours"), CANNOT.items(), ids=CANNOT)
def test_what_gpt_oss_cannot_hold_is_refused(reason: str, ours: ModelConfig) -> None:
    refused(GptOss(), ours, reason, "transformers")


def test_what_vllm_does_not_read_is_refused() -> None:
    plain = dataclasses.replace(FULL, rope_scaling=None, bias=False)
    odd = model((plain, plain), override(MOE, ["clamp.limit=5"]), norm_eps=1e-6)
    for reason in (
        "layers.*.mixer.rope_scaling: vllm always has yarn",
        "layers.*.mixer.bias: vllm always has them",
        "layers.*.mixer: vllm lets every other layer slide",
        "norm_eps: vllm always takes 1e-05",
        "layers.*.ffn.clamp: vllm always takes",
    ):
        refused(GptOss(), odd, reason, "vllm")
    scaled = dataclasses.replace(FULL, rope_scaling=dataclasses.replace(SCALED, mscale=0.7))
    refused(GptOss(), model((scaled,)), "sglang has neither attention_factor nor mscale", "sglang")
