"""transformers beside ours: the same loss and gradients from the same weights, and its steps."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.bench.peers import peer_named, transformers
from moebius.bench.peers.expressed import express
from moebius.bench.stepper import place_of, timed_step
from moebius.config import override, resolve, to_json
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.balance.switch import SwitchLoss
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.recipes import recipe
from moebius.train.run import Run
from moebius.train.session import open_data

from ..running import RECIPES, Place

pytest.importorskip("transformers", reason="the peer that is timed")

CPU = torch.device("cpu")


def llama(run: Run) -> Run:
    mixer = GQA(heads=4, kv_heads=2, head_width=8, rope_base=1e4)
    return dataclasses.replace(run, model=ModelConfig(32, 2 * (PreNorm(mixer, Dense(64)),)))


def qwen3_moe(run: Run) -> Run:
    mixer = GQA(heads=4, kv_heads=2, head_width=8, rope_base=1e6, qk_norm="head")
    router = Softmax(renormalise=True)
    moe = MoE(experts=8, expert_width=16, top_k=2, router=router, balance=(SwitchLoss(),))
    return dataclasses.replace(run, model=ModelConfig(32, 2 * (PreNorm(mixer, moe),)))


def longcat(run: Run) -> Run:
    return run


@pytest.fixture
def run(place: Place) -> Run:
    return override(recipe(f"{RECIPES}:tiny"), place.fields())


@pytest.mark.parametrize(
    ("shape", "said"), [(llama, ""), (qwen3_moe, "balance losses"), (longcat, "HiddenZ")]
)
def test_it_agrees_and_steps(shape: Any, said: str, run: Run, tmp_path: Path) -> None:
    run = shape(run)
    batch = open_data(run, None)[1].batch(0)
    peer = peer_named("transformers")(run, batch, CPU, tmp_path)
    assert peer.agrees and peer.errors["loss"] < 1e-5 and peer.errors["gradient"] < 1e-4
    assert said in " ".join(peer.notes) and "Muon" in " ".join(peer.notes)
    place = place_of(to_json(run))
    stepper = resolve(peer.stepper)(place, peer.options)
    steps = [timed_step(place, stepper) for _ in range(8)]
    assert steps[-1]["loss"] < steps[0]["loss"]
    for step in steps:
        assert 0 < step["optimizer_seconds"] < step["seconds"]
    notes = " ".join(stepper.facts()["notes"])
    assert ("experts" in notes) == (shape is not llama)
    assert shape is not qwen3_moe or "grouped_mm" in notes


def test_a_model_that_differs_does_not_agree(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = llama(run)
    right = transformers._loaded

    def other(folder: Path, dtype: torch.dtype) -> Any:
        model = right(folder, dtype)
        model.model.layers[0].mlp.down_proj.weight.data.mul_(1.05)
        return model

    monkeypatch.setattr(transformers, "_loaded", other)
    peer = peer_named("transformers")(run, open_data(run, None)[1].batch(0), CPU, tmp_path)
    assert not peer.agrees


def test_low_precision_is_compared_by_norms(run: Run, tmp_path: Path) -> None:
    run = dataclasses.replace(qwen3_moe(run), precision="bf16")
    batch = open_data(run, None)[1].batch(0)
    peer = peer_named("transformers")(run, batch, CPU, tmp_path)
    assert 0 < peer.errors["loss_low"] < 1e-2 and peer.agrees


@pytest.mark.parametrize("shape", [llama, qwen3_moe])
def test_litgpt_agrees_and_steps(shape: Any, run: Run, tmp_path: Path) -> None:
    pytest.importorskip(
        "litgpt", reason="no environment has it beside transformers 5: see its peer"
    )
    run = shape(run)
    batch = open_data(run, None)[1].batch(0)
    peer = peer_named("litgpt")(run, batch, CPU, tmp_path)
    assert peer.agrees and peer.errors["loss"] < 1e-5 and peer.errors["gradient"] < 1e-4
    place = place_of(to_json(run))
    stepper = resolve(peer.stepper)(place, peer.options)
    steps = [timed_step(place, stepper) for _ in range(8)]
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_what_litgpt_lacks_is_said(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="family longcat_flash; it has llama and qwen3_moe"):
        peer_named("litgpt")(run, open_data(run, None)[1].batch(0), CPU, tmp_path)


def test_what_no_family_holds_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="no HF family can hold the model of tiny"):
        express(override(run, ["model.layers.0.moe.shared_experts=1"]))
    with pytest.raises(ValueError, match="unknown peer 'transformer'; did you mean"):
        peer_named("transformer")
