"""The benchmarks of a recipe's optimizer and loader, and of many steps."""

import pytest
import torch

from moebius.bench.optimizer import RECIPE, REST, STEP, bench_optimizer
from moebius.bench.precision import BY_TORCH
from moebius.bench.saving import BESIDE, MEANWHILE, PLAIN, STILL
from moebius.bench.steady import _window
from moebius.bench.timing import Stopwatch, interleaved, machine
from moebius.config import override
from moebius.ops.formats import Format
from moebius.ops.native import missing
from moebius.optim.rules import Rule
from moebius.recipes import recipe

from ..running import RECIPES, Place

TINY = f"{RECIPES}:tiny"
CPU = torch.device("cpu")


def test_every_rule_is_timed_on_the_weights_of_a_recipe(place: Place) -> None:
    run = override(recipe(TINY), place.fields("matmul_flops=1e9"))
    result = bench_optimizer(run, repeats=1)
    rows = {row["name"]: row for row in result["rows"]}
    assert rows.keys() == {STEP, REST, RECIPE, *Rule.TABLE}
    step, rest = rows.pop(STEP)["seconds"], rows.pop(REST)["seconds"]
    for name, row in rows.items():
        assert row["agrees"] and row["error"] < 1e-2, name
        whole = row["seconds"] + step
        assert row["share"] == pytest.approx(row["seconds"] / whole)
        assert row["own_share"] == pytest.approx((row["seconds"] - rest) / whole)
        assert row["peak_memory_bytes"] > 0


def test_loader_and_steady(place: Place) -> None:
    fields = place.fields("matmul_flops=1e9")
    result = place.cli("bench", "loader", TINY, *fields, "--repeats", "2", "--json").data()
    loader, step = result["rows"]
    assert loader["agrees"] and loader["tokens_per_second"] > step["tokens_per_second"]
    assert loader["share"] == pytest.approx(loader["seconds"] / step["seconds"])
    options = ["--steps", "6", "--every", "2", "--json"]
    steady = place.cli("bench", "steady", TINY, *fields, *options).data()
    assert [row["name"] for row in steady["rows"]] == ["steps 0-1", "steps 2-3", "steps 4-5"]
    assert all(row["agrees"] and row["resident_bytes"] > 0 for row in steady["rows"])
    first, last = steady["rows"][1:]
    assert steady["slower"] == pytest.approx(last["seconds"] / first["seconds"])
    assert steady["grown_bytes"] == last["resident_bytes"] - first["resident_bytes"]


def test_saving_beside_the_run_and_standing_still(place: Place) -> None:
    fields = place.fields("matmul_flops=1e9")
    found = place.cli("bench", "saving", TINY, *fields, "--repeats", "2", "--json").data()
    rows = {row["name"]: row for row in found["rows"]}
    assert {PLAIN, BESIDE, STILL} <= rows.keys() <= {PLAIN, BESIDE, MEANWHILE, STILL}
    plain = rows.pop(PLAIN)["seconds"]
    for row in rows.values():
        assert row["agrees"] and row["over_plain"] == pytest.approx(row["seconds"] / plain)


def test_steps_in_every_format(place: Place) -> None:
    fields = place.fields("matmul_flops=1e9")
    found = place.cli("bench", "precision", TINY, *fields, "--repeats", "1", "--json").data()
    rows = {row["name"]: row for row in found["rows"]}
    by_torch = {name + BY_TORCH for name in Format.TABLE} if missing() is None else set()
    assert rows.keys() == {"bf16", *Format.TABLE} | by_torch
    beside = rows.pop("bf16")["seconds"]
    for name, row in rows.items():
        assert row["agrees"], name
        assert row["over_bf16"] == pytest.approx(row["seconds"] / beside)


def test_windows_are_whole(place: Place) -> None:
    refused = place.cli("bench", "steady", TINY, *place.fields(), "--steps", "5", "--every", "6")
    assert refused.error == "every (6) must lie in 1..5, the steps"
    step = {"seconds": 2.0, "peak_memory_bytes": 7, "resident_bytes": 5, "loss": float("nan")}
    assert _window(10, [step, step], recipe(TINY))["agrees"] is False


def test_works_take_turns_and_the_first_are_left_out() -> None:
    called: list[str] = []
    works = {name: lambda name=name: called.append(name) for name in ("a", "b")}
    seconds = interleaved(works, CPU, repeats=2, warm_up=1)
    assert called == ["a", "b"] * 3 and seconds.keys() == {"a", "b"}
    watch = Stopwatch(CPU)
    with watch:
        called.clear()
    assert watch.take() > 0 and watch.take() == 0


def test_a_known_rate_is_taken_over() -> None:
    facts = machine(CPU, torch.float32, 5.0)
    assert facts["matmul_flops"] == 5.0 and facts["matmul_shapes"] == "given"
