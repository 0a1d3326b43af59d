"""Llama equals transformers' own class, both ways, and what it cannot hold is refused by name."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.checkpoint.hf.exporter import export_hf
from moebius.checkpoint.hf.importer import import_hf
from moebius.checkpoint.hf.llama import Llama
from moebius.config import override
from moebius.model.block.prenorm import PreNorm
from moebius.model.ends.hidden_z import HiddenZ
from moebius.model.ends.mtp import MTP
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.swa import SWA
from moebius.model.rope import Linear, Llama3, NTKAlpha, RopeScaling, YaRN

from .families import check_unread
from .families import refused as refused_by
from .parity import (
    Twin,
    check_all,
    check_bf16,
    check_export,
    check_fresh,
    fresh_run,
    model_of,
    peer_of,
    say,
    transformers,
)

pytestmark = pytest.mark.usefixtures("one_thread")
refused = partial(refused_by, Llama())

BASE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SIZED = {"rope_theta": 300.0, "beta_fast": 16.0, "attention_factor": 1.3, "truncate": False}
CASES: dict[str, dict[str, Any]] = {
    "groups of 3, default": {},
    "groups of 1, biases": {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 14,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "groups of 8, tied": {
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "tie_word_embeddings": True,
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 900.0, "factor": 4.0}},
    "llama3, tied, biases": {
        "rope_parameters": LLAMA3,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "yarn": {"rope_parameters": YARN},
    "yarn, all set": {"rope_parameters": YARN | SIZED, "mlp_bias": True},
}


def config(**changes: Any) -> Any:
    return transformers.LlamaConfig(**{**BASE, **changes})


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_import_and_export_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_all(Twin(config(**changes), tmp_path))


@pytest.mark.parametrize("name", ["groups of 3, default", "llama3, tied, biases"])
def test_bf16_is_as_near_as_transformers_to_itself(tmp_path: Path, name: str) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 144, "head_dim": 16}
    check_bf16(Twin(config(**CASES[name] | sizes), tmp_path))


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_other_targets_get_every_key_in_both_spellings(tmp_path: Path, target: str) -> None:
    out = check_export(Twin(config(rope_parameters=LLAMA3), tmp_path), target)
    found = json.loads((out / "config.json").read_text())
    written = {"head_dim", "num_key_value_heads", "hidden_act", "rope_theta", "rope_scaling"}
    assert written | {"rope_parameters", "tie_word_embeddings"} <= found.keys()
    assert found["rope_theta"] == found["rope_parameters"]["rope_theta"] == 500_000.0
    assert found["rope_scaling"] == found["rope_parameters"]


def test_the_older_spelling_of_positions_is_read(tmp_path: Path) -> None:
    twin = Twin(config(rope_parameters=LLAMA3), tmp_path)
    path = twin.folder / "config.json"
    found = json.loads(path.read_text())
    inside = found.pop("rope_parameters")
    found |= {"rope_theta": inside.pop("rope_theta"), "torch_dtype": found.pop("dtype")}
    inside["type"] = inside.pop("rope_type")
    path.write_text(json.dumps(found | {"rope_scaling": inside}))
    check_all(twin)


def test_the_scaling_of_hunyuan_is_not_read_as_llama_s(tmp_path: Path) -> None:
    alpha = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0}
    check_unread(Twin(config(), tmp_path), {"rope_scaling": alpha}, "with alpha is Hunyuan's")


def test_bf16_stays_bf16_and_the_dtype_can_be_chosen(tmp_path: Path) -> None:
    twin = Twin(config(), tmp_path)
    twin.peer.bfloat16().save_pretrained(tmp_path / "half")
    run = import_hf(tmp_path / "half", tmp_path / "half-run", say=say)
    same = export_hf(run, tmp_path / "same", say=say)
    wide = export_hf(run, tmp_path / "wide", dtype="fp32", say=say)
    assert json.loads((run / "run.json").read_text())["precision"] == "bf16"
    half = json.loads((tmp_path / "half" / "config.json").read_text())
    assert half["dtype"] == "bfloat16"
    assert json.loads((same / "config.json").read_text()) == half
    assert json.loads((wide / "config.json").read_text()) == half | {"dtype": "float32"}
    own = peer_of(wide).state_dict()
    for name, x in transformers.AutoModelForCausalLM.from_pretrained(same).state_dict().items():
        assert x.dtype == torch.bfloat16 and own[name].dtype == torch.float32
        assert torch.equal(x.float(), own[name])


# --- models of our own ----------------------------------------------------------------------------

MIXER = GQA(heads=4, kv_heads=2, head_width=10, rope_base=5000.0)
FFN = Dense(20)


def model(mixer: GQA = MIXER, ffn: Dense = FFN, **more: Any) -> ModelConfig:
    return ModelConfig(width=32, layers=2 * (PreNorm(mixer, ffn),), **more)


@pytest.mark.parametrize(
    ("scaling", "tied"),
    [
        (None, True),
        (Linear(3.0), False),
        (Llama3(8.0, 1.0, 4.0, 32), False),
        (YaRN(4.0, 16, mscale=0.7, mscale_all_dim=0.4), True),
    ],
)
def test_a_model_of_ours_runs_in_transformers(
    tmp_path: Path, scaling: RopeScaling | None, tied: bool
) -> None:
    mixer = dataclasses.replace(MIXER, rope_scaling=scaling, bias=tied)
    ours = model(mixer, Dense(20, bias=tied), tied=tied, ends=(HiddenZ(),))
    out = check_fresh(ours, 300, tmp_path)
    # Ours scales a tied embedding by sqrt(D), theirs does not: it leaves as two tensors.
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert model_of(tmp_path / "back-transformers").ends == ()


def test_a_tied_model_without_scale_stays_tied(tmp_path: Path) -> None:
    out = check_fresh(model(tied=True, embedding_scale=1.0), 300, tmp_path)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    assert model_of(tmp_path / "back-transformers").tied


def test_text_goes_along(tmp_path: Path) -> None:
    run, _ = fresh_run(model(), 300, tmp_path / "run")
    out = export_hf(run, tmp_path / "out", dtype="bf16", say=say)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer("some text")["input_ids"]
    assert ids[0] == 0 == tokenizer.bos_token_id == tokenizer.eos_token_id and 0 not in ids[1:]
    assert tokenizer.decode(ids[1:]) == "some text"
    peer = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert peer.dtype == torch.bfloat16
    assert peer.config.bos_token_id == peer.config.eos_token_id == 0
    assert peer.generation_config.eos_token_id == 0


CANNOT = {
    "layers.*.mixer is swa": {"mixer": SWA(heads=4, kv_heads=2, head_width=8, window=4)},
    "layers.*.ffn is moe": {"ffn": MoE(experts=4, expert_width=8, top_k=2)},
    "layers.*.mixer.qk_norm: it has no QK-norm": {"mixer.qk_norm": "head"},
    "layers.*.mixer.sinks: it has none": {"mixer.sinks": "true"},
    "layers.*.mixer.rope_base: it always rotates": {"mixer.rope_base": "none"},
    "layers.*.mixer.rope_scaling: only Hunyuan has ntk_alpha": {
        "mixer": dataclasses.replace(MIXER, rope_scaling=NTKAlpha(1000.0))
    },
    "layers.*.mixer.heads: must divide the width 32": {"mixer.heads": "6"},
}


@pytest.mark.parametrize(("reason", "change"), CANNOT.items(), ids=CANNOT)
def test_what_llama_cannot_hold_is_refused(reason: str, change: dict[str, Any]) -> None:
    layer = PreNorm(MIXER, Dense(20))
    for name, value in change.items():
        if isinstance(value, str):
            layer = override(layer, [f"{name}={value}"])
        else:
            layer = dataclasses.replace(layer, **{name: value})
    refused(dataclasses.replace(model(), layers=2 * (layer,)), reason)


def test_unlike_layers_and_ends_are_refused_together() -> None:
    layers = (PreNorm(MIXER, Dense(20)), PreNorm(MIXER, Dense(24)))
    both = dataclasses.replace(model(), layers=layers, ends=(HiddenZ(), MTP(MIXER, Dense(8))))
    refused(both, "ends.1: mtp has no place in it; layers: all must be alike")


def test_a_run_that_no_family_holds_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    odd = model(dataclasses.replace(MIXER, rope_base=None, sinks=True, qk_norm="full"))
    run, _ = fresh_run(odd, 300, tmp_path / "run")
    with pytest.raises(ValueError, match="no HF family can hold this model; llama cannot hold"):
        export_hf(run, tmp_path / "out", say=say)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
