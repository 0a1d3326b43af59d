"""`moebius bench step`: its rows, and that it notices a fast path that errs.

One test starts the children; the others look at what they are made of in this process.
"""

import pytest
import torch
from torch.profiler import profile

from moebius.bench.agreement import agree, experts_error, model_errors
from moebius.bench.split import attribute, ranges
from moebius.bench.step import Plan, _plans, _ratios
from moebius.bench.table import markdown
from moebius.config import override
from moebius.data.loader import Batch
from moebius.ops.experts import BACKENDS, choose
from moebius.recipes import recipe
from moebius.train.session import open_data
from moebius.train.state import TrainState, new_state
from moebius.train.step import train_step
from moebius.train.twin import dense_twin

from ..running import RECIPES, Place

TINY = f"{RECIPES}:tiny"
CPU, FP32 = torch.device("cpu"), torch.float32
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}


def test_rows(place: Place) -> None:
    fields = place.fields("matmul_flops=none")
    options = ["--repeats", "1", "--warm-up", "1", "--no-forced-balanced", "--json"]
    result = place.cli("bench", "step", TINY, *fields, *options).data()
    assert result["precision"] == "fp32" and result["device"] == "cpu" and result["threads"] == 1
    assert result["matmul_flops"] > 1e6 and "2048x2048x2048" in result["matmul_shapes"]
    assert set(result["errors"]) == {"experts", "attention", "loss"}
    assert max(result["errors"].values()) < 1e-5
    assert result["in_use"] == {"experts": "segments", "attention": "sdpa", "loss": "chunked"}
    moe, dense = result["rows"]
    assert (moe["name"], dense["name"]) == ("tiny", "tiny-dense")
    for row in result["rows"]:
        assert row["tokens_per_second"] == pytest.approx(128 / row["seconds"])
        assert 0 < row["mfu"] < 1 and row["agrees"] is True
        assert row["peak_memory_bytes"] > 4 * row["params_total"]
        assert 0 < row["optimizer_share"] < 1 and 0 < row["data_share"] < 1
    assert moe["step_over_twin"] == pytest.approx(moe["seconds"] / dense["seconds"])
    assert dense["step_over_twin"] == 1 and moe["over_peer"] is None
    assert 1 < moe["ffn_per_token"] < 3 and moe["max_load"] > 1
    # A router is all that the MoE has active and the twin has not.
    assert moe["params_active_mean"] - dense["params_active_mean"] == 12 * 32
    assert moe["params_total"] > dense["params_total"] == dense["params_active_mean"] + 300 * 32
    split = result["split"]
    assert sum(split.values()) == pytest.approx(1) and min(split.values()) >= 0
    for group in ("router", "experts", "attention", "dense_ffn", "head_loss", "optimizer", "data"):
        assert split[group] > 0, group
    assert "| tiny-dense |" in markdown(result) and "time of tiny: " in markdown(result)


@pytest.fixture(scope="module")
def tiny(place: Place) -> tuple[TrainState, Batch]:
    run = override(recipe(TINY), place.fields())
    return new_state(run, CPU), open_data(run, None)[1].batch(0)


def test_every_product_of_a_step_belongs_to_a_part(place: Place) -> None:
    run = override(recipe(TINY), place.fields())
    state, loader = new_state(run, CPU), open_data(run, None)[1]
    with ranges(state.model, state.optimizer, loader) as spans, profile() as found:
        train_step(run, state, loader.batch(0), FP32, None, False)
    products = [event for event in found.events() or [] if event.name in PRODUCTS]
    shares = [attribute([product], spans, False) for product in products]
    groups = {group for share in shares for group in share}
    assert len(products) > 50
    assert groups >= {"router", "experts", "attention", "dense_ffn", "head_loss"}
    assert "other" not in groups and "data" not in groups


def test_a_fast_path_that_errs_is_named(
    tiny: tuple[TrainState, Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, batch = tiny
    assert agree(model_errors(state.model, batch, CPU, FP32), FP32)
    name = choose(CPU, FP32)
    right = BACKENDS[name]
    monkeypatch.setitem(BACKENDS, name, lambda *arguments: right(*arguments) * 1.001)
    assert experts_error(state.model, batch, FP32) == pytest.approx(1e-3, rel=0.1)
    assert not agree(model_errors(state.model, batch, CPU, FP32), FP32)


def test_without_a_moe_no_experts_have_to_agree(place: Place) -> None:
    run = override(dense_twin(recipe(TINY)), place.fields())
    batch = open_data(run, None)[1].batch(0)
    errors = model_errors(new_state(run, CPU).model, batch, CPU, FP32)
    assert set(errors) == {"attention", "loss"}
    assert [plan.kind for plan in _plans(run, [], True, True, 3)] == ["ours"]


def row(kind: str, seconds: float, agrees: bool) -> dict[str, object]:
    ratios = dict.fromkeys(("step_over_twin", "over_peer", "over_balanced", "memory_over_peer"))
    speed = {"seconds": seconds, "tokens_per_second": 1 / seconds}
    return {"kind": kind, "agrees": agrees, "peak_memory_bytes": 100 * seconds, **speed, **ratios}


def plan(kind: str) -> Plan:
    return Plan(kind, kind, "", None, None, True, 0)


@pytest.mark.parametrize(("ours", "peer"), [(True, True), (True, False), (False, False)])
def test_ratios_stand_between_rows_that_agree(ours: bool, peer: bool) -> None:
    plans = [plan(kind) for kind in ("ours", "balanced", "twin", "peer")]
    rows = [row("ours", 3, ours), row("balanced", 2, ours), row("twin", 1.5, ours)]
    rows.append(row("peer", 12, peer))
    _ratios(plans, rows)
    assert rows[0]["step_over_twin"] == (2 if ours else None)
    assert rows[0]["over_balanced"] == (pytest.approx(2 / 3) if ours else None)
    assert [r["over_peer"] for r in rows] == ([4, 6, None, None] if peer else [None] * 4)
    assert rows[0]["memory_over_peer"] == (0.25 if peer else None)
    assert rows[3]["step_over_twin"] == (8 if peer else None)
