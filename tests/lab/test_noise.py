"""The noise scale: gradients against autograd's own, the estimate against known noise, the verb."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.lab.noise import Repeat, noise_at_start, noise_of_folder, one_repeat, scale_of
from moebius.model.weight import named_weights
from moebius.optim.noise import expert_lr_multiplier
from moebius.train.passes import context_of
from moebius.train.run import Run
from moebius.train.session import open_data
from moebius.train.state import new_state

from .. import tiny
from ..running import RECIPES, UNJUDGED, Place, tree
from .runs import dense, placed

PATTERN = f"{RECIPES}:pattern"


@pytest.fixture(scope="module")
def recipe(place: Place) -> Run:
    return placed(tiny.pattern(), place)


def test_gradients_of_parts_and_of_their_mean(place: Place) -> None:
    """Each part's loss is a mean over its own targets; the mean of parts is that of the batch."""
    run = placed(dense(), place)
    state, batch = new_state(run, torch.device("cpu")), open_data(run, None)[1].batch(0)
    model, roles = state.model, {w.role for _, w in named_weights(state.model)}

    def squares(rows: Any) -> dict[str, float]:
        model.zero_grad()
        alone = dataclasses.replace(rows, num_targets=int(rows.valid_BT.sum()))
        ctx = context_of(alone, 0)
        loss = model.loss(alone.tokens_BT, alone.targets_BT, ctx)
        (loss.total / alone.num_targets).backward()
        by_role = dict.fromkeys(roles, 0.0)
        for _, weight in named_weights(model):
            assert weight.grad is not None
            by_role[weight.role] += float(weight.grad.double().square().sum())
        return {**by_role, "all": sum(by_role.values())}

    found = one_repeat(model, batch, 1, 0)
    assert all(weight.grad is None for weight in model.parameters())
    each = [squares(part) for part in batch.split(1)]
    assert found.small_tokens == 32 and found.big_tokens == 4 * 32 and len(each) == 4
    for role, square in found.small.items():
        assert square == pytest.approx(sum(part[role] for part in each) / 4, rel=1e-6)
    assert found.small.keys() == each[0].keys() == found.big.keys()
    assert found.big == pytest.approx(squares(batch), rel=1e-4)
    assert found.big["all"] < 0.9 * found.small["all"]


def repeats_of(count: int, signal: float, noise: float, width: int = 40) -> list[Repeat]:
    """Gradients of known signal and noise a token, drawn: 8 parts of 16 tokens a repeat."""
    generator = torch.Generator().manual_seed(0)
    g_W = torch.full((width,), (signal / width) ** 0.5, dtype=torch.float64)
    found: list[Repeat] = []
    for _ in range(count):
        draw_PW = torch.randn(8, width, generator=generator, dtype=torch.float64)
        part_PW = g_W + draw_PW * (noise / width / 16) ** 0.5
        small = float(part_PW.square().sum(-1).mean())
        big = float(part_PW.mean(0).square().sum())
        found.append(Repeat({"all": small}, {"all": big}, 16.0, 128))
    return found


def test_the_estimate_finds_known_noise() -> None:
    found = scale_of(repeats_of(300, signal=2.0, noise=600.0))
    assert found["gradient_norm_sq"] == pytest.approx(2.0, rel=0.1)
    assert found["trace"] == pytest.approx(600.0, rel=0.05)
    low, high = found["ci95"]
    assert low < 300 < high and low < found["noise_tokens"] < high
    few = scale_of(repeats_of(20, signal=2.0, noise=600.0))["ci95"]
    assert few[0] < low and few[1] > high


def test_noise_that_hides_the_gradient_has_no_scale() -> None:
    hidden = Repeat({"all": 1.0}, {"all": 0.1}, 16.0, 128)
    found = scale_of([hidden] * 3)
    assert found["noise_tokens"] is None and found["ci95"] == [None, None]
    assert found["gradient_norm_sq"] < 0
    same = Repeat({"all": 1.0}, {"all": 1.0}, 16.0, 128)
    assert scale_of([same] * 3)["noise_tokens"] == 0.0


def test_a_recipe_at_its_start(recipe: Run) -> None:
    found = noise_at_start(recipe, repeats=3)
    assert found["step"] == 0 and found["repeats"] == 3
    assert (found["small_tokens"], found["batch_tokens"]) == (32, 128)
    assert {"expert", "matrix", "router", "head", "norm"} <= found["roles"].keys()
    noise = found["noise_tokens"]
    assert noise > 0 and found["x"] == pytest.approx(128 / noise)
    # Only the second layer routes: 2 of 4 experts.
    m = expert_lr_multiplier(128, noise, 4, 2)
    assert found["layers"] == {"1": {"experts": 4, "chosen": 2.0, "multiplier": pytest.approx(m)}}
    assert found["says"].startswith(f"train with optim.roles.expert.lr={m:.3g}, but with AdamW")
    squares = {role: each["trace"] for role, each in found["roles"].items()}
    assert sum(squares.values()) == pytest.approx(found["trace"])


def test_a_run_where_it_stands(place: Place) -> None:
    """At the weights and the batches of its newest checkpoint, and nothing is written."""
    run = place.train("noisy", UNJUDGED, "stop_at=6")
    before = tree(run)
    found = noise_of_folder(run, repeats=2, micro=2, progress=None)
    assert found["step"] == 6 and found["small_tokens"] == 64 and tree(run) == before
    again = noise_of_folder(run, repeats=2, micro=2, progress=None)
    assert again == found
    # Zero-computation experts are none: 2 of 8.
    (layer,) = found["layers"].values()
    assert (layer["experts"], layer["chosen"]) == (8, 2.0)


def test_the_verb(place: Place, tmp_path: Path) -> None:
    arguments = (PATTERN, *place.fields(), "--repeats", "2")
    found = place.cli("lab", "noise", *arguments, "--json").data()
    shown = place.cli("lab", "noise", *arguments)
    assert shown.code == 0 and "expert" in shown.out and found["says"] in shown.out
    run = place.train("noisy-too", UNJUDGED, "stop_at=2")
    done = place.cli("lab", "noise", run, "--repeats", "2", "--json")
    assert json.loads(done.out)["step"] == 2
    assert "leave out the overrides" in place.cli("lab", "noise", run, "batch=2").error


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--repeats", "1"), "repeats must be at least 2"),
        (("--micro", "4"), "micro must lie in 1..3"),
        (("--micro", "0"), "micro must lie in 1..3"),
    ],
)
def test_what_cannot_be_measured(given: tuple[str, ...], said: str, place: Place) -> None:
    assert said in place.cli("lab", "noise", PATTERN, *place.fields(), *given).error
