"""The best rate of a grid by hand; a whole small sweep, its figures and charts, kept as done."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moebius.lab.draw import Chart, Line, log_ticks, svg, ticks
from moebius.lab.optimum import final_loss, fitted, optimum
from moebius.lab.transfer import Sweep, small, transfer_experiment
from moebius.model.weight import named_weights
from moebius.train.run import Run

from ..running import Place, lines
from .runs import placed

# --- the best rate --------------------------------------------------------------------------------


def bowl(rate: float, best: float, floor: float = 2.0) -> float:
    return floor + 0.3 * (math.log2(rate) - math.log2(best)) ** 2


@pytest.mark.parametrize("best", [0.0031, 0.004, 0.0055])
@pytest.mark.parametrize("root", [2.0, 2.0**0.5])
def test_the_vertex_of_a_parabola_is_found(best: float, root: float) -> None:
    rates = [0.0005 * root**i for i in range(14)]
    found = optimum(rates, [bowl(rate, best) for rate in rates])
    assert found["inside"] and found["best_rate"] == pytest.approx(best)
    assert found["best_loss"] == pytest.approx(2.0)


def test_far_points_and_diverged_runs_do_not_move_it() -> None:
    rates = [0.001, 0.002, 0.004, 0.008, 0.016]
    losses = [9.0, *(bowl(rate, 0.0045) for rate in rates[1:4]), None]
    assert optimum(rates, losses)["best_rate"] == pytest.approx(0.0045)


def test_a_minimum_at_the_end_is_only_a_bound() -> None:
    assert optimum([1, 2, 4], [3.0, 2.0, 1.0]) == {
        "best_rate": 4.0,
        "best_loss": 1.0,
        "inside": False,
    }
    assert not optimum([1, 2, 4], [1.0, 2.0, 3.0])["inside"]
    assert not optimum([1, 2, 4], [3.0, 2.0, None])["inside"]
    with pytest.raises(ValueError, match="choose lower rates"):
        optimum([1, 2, 4], [None] * 3)


def test_noisy_points_give_the_least_of_them() -> None:
    """Five points within a factor 2 that bend down, but for the least in their middle."""
    rates = [2 ** (i / 2) for i in range(5)]
    found = optimum(rates, [1.0, 2.0, 0.99, 2.0, 1.0])
    assert found["inside"] and found["best_rate"] == pytest.approx(2.0)
    assert found["best_loss"] == 0.99


def test_means_over_seeds_and_each_seed() -> None:
    rates = [0.001, 0.002, 0.004, 0.008]
    by_seed = [[bowl(rate, best) for best in (0.002, 0.004)] for rate in rates]
    found = fitted(rates, by_seed)
    assert found["best_by_seed"] == pytest.approx([0.002, 0.004])
    assert found["best_rate"] == pytest.approx(0.002 * 2**0.5)
    assert found["mean_losses"] == pytest.approx([sum(row) / 2 for row in by_seed])
    assert fitted(rates, [*by_seed[:3], [1.0, None]])["mean_losses"][3] is None


def test_the_final_loss_is_that_of_the_last_tenth() -> None:
    assert final_loss([9.0] * 18 + [2.0, 3.0]) == 2.5
    assert final_loss([9.0, 4.0]) == 4.0
    assert final_loss([9.0] * 18 + [2.0, None]) is None


# --- the sweep ------------------------------------------------------------------------------------


def test_every_width_is_proportional() -> None:
    """Hidden weights go with the square of the width; the head and the vectors with the width."""
    one, two = (small(width) for width in (128, 256))
    sizes: list[dict[str, int]] = []
    for run in (one, two):
        sizes.append({})
        for _, weight in named_weights(run.model.build(64)):
            sizes[-1][weight.role] = sizes[-1].get(weight.role, 0) + weight.numel()
    assert {role: n / sizes[0][role] for role, n in sizes[1].items()} == {
        "matrix": 4,
        "embedding": 2,
        "head": 2,
        "norm": 2,
    }
    rules = {type(role.rule).__name__ for role in one.optim.roles.values()}
    assert rules == {"AdamW"} and one.optim.roles == two.optim.roles
    for width in (48, 0):
        with pytest.raises(ValueError, match="multiple of 32"):
            small(width)


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    return Sweep(widths=(32, 64), rates=(0.002, 0.02, 50.0), seeds=1)


OVERRIDES = ("steps=10", "batch=2", "sequence_length=16", "vocab=300", "threads=1")


@pytest.fixture(scope="module")
def done(sweep: Sweep, place: Place) -> tuple[Path, dict[str, Any]]:
    out = place.folder / "transfer"
    return out, experiment(sweep, out, place)


def experiment(sweep: Sweep, out: Path, place: Place, *more: str) -> dict[str, Any]:
    def recipe(width: int) -> Run:
        return dataclasses.replace(placed(small(width), place), matmul_flops=1e11)

    return transfer_experiment(sweep, out, recipe=recipe, overrides=(*OVERRIDES, *more))


def test_it_reports_what_the_runs_say(done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    assert json.loads((out / "transfer.json").read_text()) == result
    assert [(row["mode"], row["width"]) for row in result["rows"]] == [
        ("off", 32),
        ("off", 64),
        ("on", 32),
        ("on", 64),
    ]
    names = {"off": ("both-32", "off-64"), "on": ("both-32", "on-64")}
    for row in result["rows"]:
        folder = out / names[row["mode"]][row["width"] == 64]
        for rate, (loss,) in zip(row["rates"], row["losses"], strict=True):
            run = folder / f"lr-{rate:.4g}-seed-0"
            assert len(lines(run)) == 10 and loss == lines(run)[-1]["loss"]
            assert not (run / "checkpoints").exists() and not (run / "report.html").exists()
    off, on = ([row for row in result["rows"] if row["mode"] == mode] for mode in ("off", "on"))
    assert off[0] | {"mode": "on"} == on[0] and off[1]["losses"] != on[1]["losses"]
    for mode, rows in (("off", off), ("on", on)):
        best = [row["best_rate"] for row in rows]
        assert result["factors"][mode]["factor"] == max(best) / min(best)


def test_the_rule_is_in_the_runs(done: tuple[Path, dict[str, Any]]) -> None:
    out, _ = done
    kept = {
        folder: json.loads((out / folder / "lr-0.02-seed-0/run.json").read_text())["run"]["optim"]
        for folder in ("both-32", "off-64", "on-64")
    }
    assert [kept[name]["transfer_from_width"] for name in kept] == [None, None, 32]
    assert {kept[name]["lr"] for name in kept} == {0.02}


def test_what_is_done_is_not_done_again(
    sweep: Sweep, done: tuple[Path, dict[str, Any]], place: Place
) -> None:
    """A further rate trains its own runs only; another experiment's folder is refused."""
    out, result = done

    def times() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in out.glob("*/*/**/*") if p.is_file()}

    before = times()
    assert experiment(sweep, out, place) == result and times() == before and len(before) > 20
    more = dataclasses.replace(sweep, rates=(0.002, 0.006, 0.02, 50.0), modes=("off",))
    wider = experiment(more, out, place)
    assert before.items() < times().items() and wider["factors"].keys() == {"off"}
    old, new = (found["rows"][0]["losses"] for found in (result, wider))
    assert [new[0], *new[2:]] == old
    with pytest.raises(ValueError, match=r"holds another experiment \(batch: 2 -> 3\)"):
        experiment(sweep, out, place, "batch=3")
    assert experiment(sweep, out, place) == result


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"widths": (64,)}, "two or more different ones"),
        ({"widths": (64, 64)}, "two or more different ones"),
        ({"rates": (0.1, 0.2)}, "three or more, rising"),
        ({"rates": (0.1, 0.3, 0.2)}, "three or more, rising"),
        ({"rates": (0.0, 0.3, 0.4)}, "above 0"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"modes": ("maybe",)}, "modes are off and on"),
    ],
)
def test_what_is_no_sweep(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sweep(**change)


def test_the_verb(place: Place) -> None:
    given = ("lab", "transfer", *place.fields(*OVERRIDES, "steps=2"), "--modes", "off")
    grid = ("--widths", "32,64", "--rates", "0.001,0.002,0.004")
    done = place.cli(*given, *grid, "--out", "transfer-verb")
    out = place.folder / "transfer-verb"
    found = json.loads((out / "transfer.json").read_text())
    assert [row["width"] for row in found["rows"]] == [32, 64]
    assert done.code == 0 and found["says"] in done.err and (out / "transfer.svg").is_file()
    # The speed of plain products is measured once.
    speeds = {json.loads(run.read_text())["matmul_flops"] for run in out.glob("*/*/run.json")}
    assert len(speeds) == 1
    error = place.cli("lab", "transfer", "--widths", "32,wide").error
    assert error == "'32,wide' is no list of numbers such as 128,256,512"


# --- charts ---------------------------------------------------------------------------------------


def test_the_charts_of_the_sweep(done: tuple[Path, dict[str, Any]]) -> None:
    out, result = done
    root = ElementTree.fromstring((out / "transfer.svg").read_text())
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f".//{space}polyline")) == 4
    texts = [text.text for text in root.iter(f"{space}text")]
    assert {"width 32", "width 64", "learning rate"} <= set(texts)
    page = (out / "transfer.html").read_text()
    assert result["says"] in page and page.count("<figure>") == 2


def test_points_lie_where_they_belong() -> None:
    """Rates a decade apart are as far apart; the ring of a mark is on its point."""
    line = Line("a & b", (0.01, 0.1, 1.0), (1.0, 3.0, 2.0), marks=((0.1, 3.0),))
    root = ElementTree.fromstring(svg([Chart("<t>", "x", "y", (line,), log_x=True)]))
    (path,) = root.iter("{http://www.w3.org/2000/svg}polyline")
    points = [tuple(map(float, p.split(","))) for p in path.attrib["points"].split()]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.11)
    assert points[1][1] < points[2][1] < points[0][1]
    assert (points[0][1] - points[1][1]) == pytest.approx(
        2 * (points[0][1] - points[2][1]), abs=0.11
    )
    rings = [c.attrib for c in root.iter("{http://www.w3.org/2000/svg}circle")]
    (ring,) = (c for c in rings if c["r"] == "5.5")
    assert (float(ring["cx"]), float(ring["cy"])) == points[1]
    with pytest.raises(ValueError, match="has no points"):
        svg([Chart("t", "x", "y", ())])


def test_ticks_are_round() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(1.93, 2.31) == pytest.approx([2.0, 2.1, 2.2, 2.3])
    assert ticks(3.0, 3.0) == [3.0]
    assert log_ticks(0.0004, 0.03) == pytest.approx([0.0005, 0.001, 0.002, 0.005, 0.01, 0.02])


def test_high_cuts_lines_that_run_away() -> None:
    line = Line("a", (1.0, 2.0, 3.0), (1.0, 2.0, 900.0))
    picture = svg([Chart("t", "x", "y", (line,), high=3.0)])
    heights = [float(y) for y in re.findall(r"[\d.]+,(-?[\d.]+)", picture.split("polyline")[1])]
    # The last point lies far above the panel, whose rectangle cuts the line.
    assert 20 < heights[1] < heights[0] - 50 and heights[2] < -1000
    inside = picture.split('clip-path="url(#panel)"')[1]
    assert "<polyline" in inside and 'id="panel"' in picture
