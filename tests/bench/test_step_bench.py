"""`moebius bench step`: its rows, its dense twin, and that it notices a fast path that errs."""

import pytest
import torch

from moebius.bench.step import bench_step
from moebius.train.twin import dense_twin
from moebius.config import override
from moebius.model.block.prenorm import PreNorm
from moebius.model.block.scmoe import ScMoE
from moebius.model.ffn.dense import Dense
from moebius.ops.experts import BACKENDS, choose
from moebius.recipes import recipe
from moebius.train.session import check

from ..running import RECIPES, Place

TINY = f"{RECIPES}:tiny"


def test_rows(place: Place) -> None:
    fields = place.fields("matmul_flops=none")
    result = place.cli("bench", "step", TINY, *fields, "--repeats", "2", "--json").data()
    assert result["precision"] == "fp32" and result["device"] == "cpu" and result["threads"] == 1
    assert result["matmul_flops"] > 1e6 and result["experts"] in BACKENDS
    assert result["expert_error"] < 1e-5
    moe, dense = result["rows"]
    assert (moe["name"], dense["name"]) == ("tiny", "tiny-dense")
    for row in result["rows"]:
        assert row["tokens_per_second"] == pytest.approx(128 / row["seconds"])
        assert 0 < row["mfu"] < 1 and row["agrees"] is True
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 0
    assert moe["step_over_twin"] == pytest.approx(moe["seconds"] / dense["seconds"])
    assert dense["step_over_twin"] == 1
    # A router is all that the MoE has active and the twin has not.
    assert moe["params_active_mean"] - dense["params_active_mean"] == 12 * 32
    assert moe["params_total"] > dense["params_total"] == dense["params_active_mean"] + 300 * 32


def test_the_table(place: Place) -> None:
    shown = place.cli("bench", "step", TINY, *place.fields(), "--repeats", "1")
    assert shown.code == 0 and "tiny-dense" in shown.out and "yes" in shown.out


def test_every_moe_becomes_a_swiglu_of_its_mean_width() -> None:
    run = recipe(TINY)
    twin = dense_twin(run)
    (layer,) = twin.model.layers
    assert isinstance(layer, ScMoE) and layer.moe == Dense(2 * 16) and layer.dense == Dense(32)
    assert (twin.optim, twin.data, twin.steps) == (run.optim, run.data, run.steps)
    budget = dense_twin(override(run, ["model.layers.0.moe.ffn_per_token=1.3"])).model.layers[0]
    assert isinstance(budget, ScMoE) and budget.moe == Dense(round(1.3 * 16))
    first, second = dense_twin(recipe(f"{RECIPES}:pattern")).model.layers
    assert isinstance(first, PreNorm) and first.ffn == Dense(64)
    # Two of four experts, and one that is shared.
    assert isinstance(second, PreNorm) and second.ffn == Dense(3 * 32)


@pytest.mark.parametrize("name", ["quickstart", TINY, f"{RECIPES}:pattern"])
def test_active_parameters_are_equal_but_for_the_router(name: str) -> None:
    run = recipe(name)
    moe, dense = check(run), check(dense_twin(run))
    assert dense.active_min == dense.active_mean == dense.active_max
    assert moe.active_mean == pytest.approx(dense.active_mean, rel=0.03)


def test_a_fast_path_that_errs_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    run = override(recipe(TINY), place.fields("matmul_flops=1e9"))
    name = choose(torch.device("cpu"), torch.float32)
    right = BACKENDS[name]
    monkeypatch.setitem(BACKENDS, name, lambda *arguments: right(*arguments) * 1.001)
    result = bench_step(run, repeats=1)
    assert result["expert_error"] == pytest.approx(1e-3, rel=0.1)
    assert [row["agrees"] for row in result["rows"]] == [False, False]
    assert [row["step_over_twin"] for row in result["rows"]] == [None, None]


def test_without_a_moe_nothing_has_to_agree(place: Place) -> None:
    run = override(recipe(TINY), place.fields("matmul_flops=1e9"))
    result = bench_step(dense_twin(run), repeats=1)
    assert result["expert_error"] is None and all(row["agrees"] for row in result["rows"])
