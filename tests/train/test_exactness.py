"""What must not change a run's losses by a bit, and what a run in another precision is made of."""

import json
from pathlib import Path

import pytest
import torch

import moebius
from moebius.checkpoint import complete, load
from moebius.model.count import count
from moebius.model.weight import named_weights
from moebius.train.precision import DTYPES, choose

from ..running import UNJUDGED, Place, lines, losses


@pytest.fixture(scope="module", params=["tiny", "pattern", "wild"])
def plain(request: pytest.FixtureRequest, place: Place) -> tuple[str, Path]:
    """A recipe, and its run with every step logged and measured."""
    recipe = request.param
    return recipe, place.train(f"{recipe}-plain", "measure_every=1", UNJUDGED, recipe=recipe)


def test_a_run_that_was_stopped_goes_on_exactly(plain: tuple[str, Path], place: Place) -> None:
    recipe, run = plain
    other = place.train(f"{recipe}-stopped", "stop_at=5", recipe=recipe)
    for stop in ("6", "none"):
        done = place.cli("train", "--resume", other, f"stop_at={stop}", UNJUDGED)
        assert done.code == 0, done.err
    assert losses(other) == losses(run)


@pytest.mark.parametrize("field", ["log_every=5", "measure_every=100", "recompute=true"])
def test_losses_are_the_same_with(field: str, plain: tuple[str, Path], place: Place) -> None:
    recipe, run = plain
    other = place.train(f"{recipe}-{field}", field, UNJUDGED, recipe=recipe)
    found = losses(other)
    assert list(found) == ([5, 10, 12] if field == "log_every=5" else list(range(1, 13)))
    assert found == {step: loss for step, loss in losses(run).items() if step in found}


def test_losses_do_not_know_how_the_text_was_prepared(
    plain: tuple[str, Path], corpus: Path, tmp_path: Path, place: Place
) -> None:
    recipe, run = plain
    for workers in (1, 3):
        own = Place(tmp_path, corpus, tmp_path / f"cache-{workers}")
        fields = (f"data.workers={workers}", UNJUDGED)
        other = own.train(f"run-{workers}", *fields, recipe=recipe)
        assert losses(other) == losses(run)


def test_a_seed_gives_one_run_and_another_seed_another(
    plain: tuple[str, Path], place: Place
) -> None:
    recipe, run = plain
    assert losses(place.train(f"{recipe}-again", UNJUDGED, recipe=recipe)) == losses(run)
    other = losses(place.train(f"{recipe}-other", "seed=1", UNJUDGED, recipe=recipe))
    assert not set(other.values()) & set(losses(run).values())


def test_micro_batches_change_rounding_only(plain: tuple[str, Path], place: Place) -> None:
    recipe, run = plain
    other = place.train(f"{recipe}-micro", "micro_batch=3", UNJUDGED, recipe=recipe)
    pairs = zip(lines(run), lines(other), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-3) for a, b in pairs)
    assert lines(other)[0]["loss"] == pytest.approx(lines(run)[0]["loss"], rel=1e-6)


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "master"), [("bf16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")])
def test_a_run_in_each_precision(name: str, master: str, place: Place) -> None:
    run = place.train(name, f"precision={name}")
    record = json.loads((run / "run.json").read_text())
    assert record["precision"] == name and record["precision_trial"] == {}
    assert json.loads((run / "summary.json").read_text())["precision"] == name
    tensors, state = load(complete(run / "checkpoints")[-1])
    assert state["precision"] == name
    floats = {key: x.dtype for key, x in tensors.items() if x.is_floating_point()}
    assert len(floats) > 20 and set(floats.values()) == {DTYPES[master]}
    model, _ = moebius.load(run)
    assert {weight.dtype for _, weight in named_weights(model.lm)} == {DTYPES[master]}
    assert model(torch.zeros(1, 5, dtype=torch.int64)).isfinite().all()
    assert place.cli("sample", run, "--num-tokens", "3").code == 0


def test_precisions_agree(place: Place) -> None:
    found = {}
    for name in ("bf16", "fp32", "fp64"):
        run = place.train(f"agree-{name}", f"precision={name}", "stop_at=2")
        found[name] = [line["loss"] for line in lines(run)]
    assert found["fp32"] == pytest.approx(found["fp64"], rel=1e-5)
    assert found["fp32"] != found["fp64"]
    assert found["bf16"] == pytest.approx(found["fp64"], rel=1e-2)


def test_auto_records_what_it_measured(place: Place) -> None:
    run = place.train("auto", "precision=auto", "stop_at=2")
    record = json.loads((run / "run.json").read_text())
    trial = record["precision_trial"]
    assert trial.keys() == {"bf16", "fp32"} and record["precision"] == min(trial, key=trial.get)
    assert record["run"]["precision"] == "auto"
    done = place.cli("train", "--resume", run, "stop_at=3")
    assert done.code == 0 and lines(run)[-1]["step"] == 3


def test_the_measurement_leaves_no_trace(place: Place) -> None:
    run = place.train("auto-trace", "precision=auto", UNJUDGED)
    name = json.loads((run / "run.json").read_text())["precision"]
    assert losses(run) == losses(place.train("no-trace", f"precision={name}", UNJUDGED))


def test_auto_takes_the_faster() -> None:
    tried = []
    name, seconds = choose("auto", torch.device("cpu"), tried.append)
    assert tried == [torch.bfloat16, torch.float32] * 4
    assert seconds[name] == min(seconds.values())


# --- a loaded model -------------------------------------------------------------------------------


def test_a_loaded_model_is_whole(place: Place, plain: tuple[str, Path]) -> None:
    """Its weights keep their roles, tied ones stay one, and it counts what the run counted."""
    recipe, run = plain
    lm = moebius.load(run)[0].lm
    record = json.loads((run / "run.json").read_text())
    assert count(lm, 32).total == record["params_total"]
    assert (lm.head.w_VD is lm.embed.w_VD) == (recipe != "tiny")
    assert not lm.training
