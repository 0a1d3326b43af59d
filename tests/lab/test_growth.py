"""The experiment on growth: equal FLOPs by hand, both arms trained, work that goes on."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from moebius.lab.growth import arms_of, growth_experiment, paired, small
from moebius.lab.interval import student_t
from moebius.model.count import count_config
from moebius.train.run import Run

from ..running import Place, lines
from .runs import HELD_OUT, dense, placed


@pytest.fixture(scope="module")
def recipe(place: Place) -> Run:
    return placed(dataclasses.replace(dense(), steps=6), place, evaluation=HELD_OUT)


@pytest.fixture(scope="module")
def done(recipe: Run, place: Place) -> tuple[Path, dict[str, Any]]:
    """The whole experiment of two seeds."""
    out = place.folder / "growth"
    return out, growth_experiment(recipe, out, seeds=2)


def times(out: Path) -> dict[str, int]:
    """When each file of the arms was last written."""
    return {str(p): p.stat().st_mtime_ns for p in sorted(out.glob("seed-*/**/*")) if p.is_file()}


def test_both_arms_cost_the_same(recipe: Run) -> None:
    run = dataclasses.replace(recipe, steps=600)
    arms = arms_of(run)
    layers = run.model.layers
    large = dataclasses.replace(run.model, layers=layers + layers)
    cheap, dear = (count_config(model, 300, 32).flops_train for model in (run.model, large))
    assert cheap < dear
    assert arms.grow_at == 200 and arms.tokens_per_step == 4 * 32
    steps = (200 * cheap + 400 * dear) / dear
    assert abs(arms.scratch_steps - steps) <= 0.5 and 400 < steps < 600
    assert arms.grown_arm_flops == pytest.approx(128 * (200 * cheap + 400 * dear))
    assert arms.scratch_arm_flops == pytest.approx(128 * arms.scratch_steps * dear)
    assert arms.grown_arm_flops == pytest.approx(arms.scratch_arm_flops, rel=0.5 / 400)


def test_it_reports_what_the_runs_say(recipe: Run, done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    assert json.loads((out / "growth.json").read_text()) == result
    arms = arms_of(recipe)
    assert result["grown_steps"] == [2, 4] and result["scratch_steps"] == arms.scratch_steps
    assert result["layers"] == [2, 4]
    assert [row["seed"] for row in result["seeds"]] == [0, 1]
    for row in result["seeds"]:
        folder = out / f"seed-{row['seed']}"
        for name, steps in (("scratch", arms.scratch_steps), ("grown", 6)):
            summary = json.loads((folder / name / "summary.json").read_text())
            assert row[name]["val_loss"] == summary["val_loss"]
            assert row[name]["steps"] == summary["steps"] == steps == len(lines(folder / name))
        assert row["difference"] == row["grown"]["val_loss"] - row["scratch"]["val_loss"]
        assert row["grown"]["step"] == 2 and len(lines(folder / "small")) == 2
        assert lines(folder / "grown")[:2] == lines(folder / "small")
        # The rate falls to its floor at the end of both.
        assert {lines(folder / name)[-1]["lr"] for name in ("scratch", "grown")} == {0.0}
    differences = [row["difference"] for row in result["seeds"]]
    assert result["difference"] == paired(differences)
    mismatch = result["flops"]["grown"] / result["flops"]["scratch"] - 1
    assert result["flops_mismatch"] == pytest.approx(mismatch) and abs(mismatch) < 0.1


def test_what_is_done_is_not_done_again(recipe: Run, done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    before = times(out)
    assert growth_experiment(recipe, out, seeds=2) == result
    assert times(out) == before and len(before) > 40


def test_interrupted_work_goes_on(
    recipe: Run, done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Stopped after the first arm, within the second, and where a kill left an empty start."""
    out = tmp_path / "growth"
    shutil.copytree(done[0] / "seed-0/scratch", out / "seed-0/scratch")
    (out / "seed-0/small/code").mkdir(parents=True)
    said: list[str] = []

    def interrupt(text: str) -> None:
        said.append(text)
        if text.startswith("grown into"):
            raise KeyboardInterrupt

    before = times(out)
    with pytest.raises(KeyboardInterrupt):
        growth_experiment(recipe, out, seeds=1, say=interrupt)
    assert not (out / "growth.json").exists()
    assert len(lines(out / "seed-0/grown")) == 2
    result = growth_experiment(recipe, out, seeds=1)
    assert before.items() <= times(out).items()
    whole = done[1]["seeds"][0]
    assert result["seeds"][0]["grown"]["val_loss"] == whole["grown"]["val_loss"]
    assert result["difference"]["ci95"] is None


def test_another_experiments_folder_is_refused(
    recipe: Run, done: tuple[Path, dict[str, Any]]
) -> None:
    out, _ = done
    before = times(out)
    other = dataclasses.replace(recipe, batch=6)
    with pytest.raises(ValueError, match=r"holds another experiment \(batch: 4 -> 6\)"):
        growth_experiment(other, out, seeds=1)
    assert times(out) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [({"batch_ramp": ((2, 8),)}, "leave out batch_ramp and stages"), ({"steps": 2}, "at least 3")],
)
def test_what_cannot_be_compared(
    change: dict[str, Any], said: str, recipe: Run, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        growth_experiment(dataclasses.replace(recipe, **change), tmp_path / "out")
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        growth_experiment(recipe, tmp_path / "out", seeds=0)
    assert not (tmp_path / "out").exists()


def test_the_recipe_of_the_experiment() -> None:
    arms = arms_of(small())
    assert len(small().model.layers) == 2 and arms.grow_at * 3 == arms.steps == small().steps
    assert abs(arms.grown_arm_flops / arms.scratch_arm_flops - 1) < 2e-3


# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.7062047), (2, 4.3026527), (4, 2.7764451), (9, 2.2621572), (30, 2.0422725)],
)
def test_students_t_of_the_tables(freedom: int, t: float) -> None:
    assert student_t(freedom) == pytest.approx(t, rel=1e-7)


def test_students_t_in_closed_form() -> None:
    """One degree of freedom is Cauchy's, two have an algebraic quantile."""
    assert student_t(1, 0.5) == pytest.approx(1.0)
    p = 0.9
    assert student_t(2, p) == pytest.approx(p * math.sqrt(2 / (1 - p * p)))


def test_paired_differences() -> None:
    found = paired([-0.03, -0.01, -0.02])
    assert found["mean"] == pytest.approx(-0.02)
    reach = 4.3026527 * 0.01 / math.sqrt(3)
    assert found["ci95"] == pytest.approx([-0.02 - reach, -0.02 + reach], rel=1e-6)
    assert found["says"].endswith("undecided")
    assert paired([-0.021, -0.019, -0.02])["says"].endswith("grown is lower")
    assert paired([0.021, 0.019, 0.02])["says"].endswith("grown is higher")
    assert paired([0.1]) == {
        "mean": 0.1,
        "ci95": None,
        "pairs": 1,
        "says": "+0.1000 nats a token: undecided",
    }
