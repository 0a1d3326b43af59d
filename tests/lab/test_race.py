"""A race between a MoE and its dense twin: who trains what, how far, and what is said of it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.eval.bits_per_byte import Heldout, bits_per_byte
from moebius.infer.load import load
from moebius.lab.race import Race, race_experiment
from moebius.lab.race_result import compared, race_charts, summary
from moebius.lab.trained import identity_of
from moebius.model.ffn.dense import Dense
from moebius.train.folder import RunFolder
from moebius.train.run import Run
from moebius.train.session import open_data, read_run

from .. import tiny
from ..running import RECIPES, Place, losses
from .runs import placed

RACE = Race(moe_lr=0.008, dense_lr=0.02, moe_steps=6, seeds=2, looks=3)


@pytest.fixture(scope="module")
def recipe(place: Place) -> Run:
    return placed(tiny.pattern(), place)


@pytest.fixture(scope="module")
def done(recipe: Run, place: Place) -> tuple[Path, dict[str, Any]]:
    out = place.folder / "race"
    return out, race_experiment(RACE, recipe, out)


def test_each_has_its_rate_its_steps_and_the_same_data(recipe: Run) -> None:
    runs = RACE.runs(recipe)
    assert [runs[name].optim.lr for name in runs] == [0.008, 0.02]
    assert [runs[name].steps for name in runs] == [6, 12]
    assert len({(r.data, r.seed, r.batch, r.sequence_length) for r in runs.values()}) == 1
    # 2 selected experts and 1 shared of width 32 are one SwiGLU of 96.
    twin, moe = (runs[name].model.layers for name in ("dense", "moe"))
    assert twin == (moe[0], dataclasses.replace(moe[1], ffn=Dense(96)))
    plain = Race(seeds=1, looks=3).runs(recipe)
    assert {(r.optim.lr, r.steps) for r in plain.values()} == {(recipe.optim.lr, recipe.steps)}


def test_it_reports_what_was_trained(recipe: Run, done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    assert json.loads((out / "race.json").read_text()) == result
    assert [row["seed"] for row in result["seeds"]] == [0, 1]
    assert result["steps"] == {"moe": 6, "dense": 12} and result["run"] == "pattern"
    assert 0.9 < result["active"]["moe"] / result["active"]["dense"] < 1.1
    assert result["total"]["moe"] > result["total"]["dense"]
    for row in result["seeds"]:
        for name, steps in (("moe", [2, 4, 6]), ("dense", [4, 8, 12])):
            curve = row[name]["curve"]
            assert [step for step, _, _ in curve] == steps
            clock = [seconds for _, seconds, _ in curve]
            assert clock[0] > 0 and clock == sorted(clock)
            assert [row[name]["seconds"], row[name]["loss"]] == curve[-1][1:]
            assert row[name]["tokens"] == steps[-1] * recipe.tokens_per_step()
        assert row["difference"] == row["moe"]["loss"] - row["dense"]["loss"]
        assert row["time_ratio"] == row["moe"]["seconds"] / row["dense"]["seconds"]
    assert {path.name for path in out.glob("race.*")} == {"race.json", "race.html", "race.svg"}


def test_the_losses_are_those_of_the_models(
    recipe: Run, done: tuple[Path, dict[str, Any]], place: Place
) -> None:
    """By the evaluation's own code on the saved weights; and they are those of a plain run."""
    out, result = done
    for name in ("moe", "dense"):
        folder = out / "seed-1" / name
        run, _ = read_run(RunFolder.open(folder))
        want = RACE.runs(dataclasses.replace(recipe, seed=1))[name]
        assert identity_of(run) == identity_of(want)
        heldout = Heldout(open_data(run, None)[0], 32, 4, torch.float32, torch.device("cpu"))
        lm = load(folder)[0].lm.eval()
        found = bits_per_byte(lm, heldout)
        assert found.loss == pytest.approx(result["seeds"][1][name]["loss"], rel=1e-6)
    fields = ("seed=1", "steps=6", "optim.lr=0.008", "stop_at=6", "log_every=1")
    plain = place.train("plain", *fields, f"evaluation={RECIPES}:no_evaluation", recipe="pattern")
    assert len(losses(plain)) == 6
    ours, theirs = (load(folder)[0].lm for folder in (out / "seed-1/moe", plain))
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_what_is_done_is_not_done_again(
    recipe: Run, done: tuple[Path, dict[str, Any]], place: Place
) -> None:
    out, result = done
    before = {str(p): p.stat().st_mtime_ns for p in out.glob("seed-*/**/*")}
    assert race_experiment(RACE, recipe, out) == result
    assert {str(p): p.stat().st_mtime_ns for p in out.glob("seed-*/**/*")} == before
    with pytest.raises(ValueError, match=r"holds another experiment \(optim.lr: 0.02 -> 0.03\)"):
        race_experiment(dataclasses.replace(RACE, dense_lr=0.03), recipe, out)
    # A race that was broken off leaves runs without a result: it begins anew.
    (out / "seed-0/race.json").unlink()
    again = race_experiment(RACE, recipe, out)
    for old, new in zip(result["seeds"], again["seeds"], strict=True):
        for name in ("moe", "dense"):
            assert [p[2] for p in new[name]["curve"]] == [p[2] for p in old[name]["curve"]]
    assert again["seeds"][1] == result["seeds"][1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_ramp": ((2, 8),)}, "leave out batch_ramp and stages"),
        ({"steps": 2}, "fewer steps than it is looked at"),
        ({"model": tiny.ModelConfig(32, (tiny.pattern().model.layers[0],))}, "has no MoE layer"),
    ],
)
def test_what_cannot_race(change: dict[str, Any], said: str, recipe: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        race_experiment(RACE, dataclasses.replace(recipe, **change), tmp_path / "out")
    for wrong in ({"seeds": 0}, {"looks": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            Race(**wrong)
    assert not (tmp_path / "out").exists()


def test_a_model_that_diverges_says_so(recipe: Run, tmp_path: Path) -> None:
    race = Race(moe_lr=1e30, dense_lr=0.02, seeds=1, looks=1)
    fragile = dataclasses.replace(recipe, max_bad_steps=1)
    with pytest.raises(ValueError, match="pattern diverged at step 2; give it a lower rate"):
        race_experiment(race, fragile, tmp_path / "out")


# --- figures --------------------------------------------------------------------------------------


def side(*curve: tuple[float, float]) -> dict[str, Any]:
    """A model seen at these (seconds, loss)."""
    points = [[i, seconds, loss] for i, (seconds, loss) in enumerate(curve, start=1)]
    return {"seconds": curve[-1][0], "loss": curve[-1][1], "curve": points}


def test_who_wins() -> None:
    dense = side((10.0, 4.0), (20.0, 3.0))
    faster = compared(side((6.0, 3.5), (12.0, 3.0), (15.0, 2.9)), dense)
    assert faster["wins"] and faster["reached_seconds"] == 12.0 and faster["reached_share"] == 0.6
    assert faster["time_ratio"] == 0.75 and faster["difference"] == pytest.approx(-0.1)
    worse = compared(side((6.0, 3.5), (15.0, 3.1)), dense)
    assert not worse["wins"] and worse["reached_seconds"] is worse["reached_share"] is None
    slower = compared(side((20.0, 2.5), (21.0, 2.4)), dense)
    assert not slower["wins"] and slower["reached_share"] == 1.0


def test_the_sentence_of_all_seeds() -> None:
    dense = side((20.0, 3.0))
    rows = [compared(side((10.0 + i, 2.8 + 0.01 * i)), dense) for i in range(3)]
    found = summary(rows)
    assert found["first"] == 3
    assert found["wins"] == 3 and found["time_ratio"] == pytest.approx(11 / 20)
    assert found["reached_share"] == pytest.approx(11 / 20)
    assert "in 3 of 3 races" in found["says"] and "the MoE is lower" in found["says"]
    lost = summary([*rows, compared(side((10.0, 3.5)), dense)])
    assert lost["wins"] == 3 and lost["reached_share"] is None and lost["first"] == 3
    whole, end = race_charts(rows)
    assert len(whole.lines) == 6 and {line.name for line in end.lines} == {"MoE", "dense twin"}
    assert end.high is not None and whole.high is not None and end.high < whole.high


def test_the_verb(place: Place, done: tuple[Path, dict[str, Any]]) -> None:
    """On the folder of the experiment above: nothing is left to train."""
    out, _ = done
    given = (f"{RECIPES}:pattern", *place.fields(f"evaluation={RECIPES}:no_evaluation"))
    options = ("--moe-lr", "0.008", "--dense-lr", "0.02", "--moe-steps", "6", "--seeds", "2")
    found = place.cli("lab", "race", *given, *options, "--looks", "3", "--out", out)
    assert found.code == 0 and "in less time" in found.err, found.err
    refused = place.cli("lab", "race", *given, "--looks", "0").error
    assert "looks=0 must be at least 1" in refused
