"""Meters against numpy and explicit autograd: loads, spread, similarity, R_g, hidden norms."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moebius.model.context import Context
from moebius.model.ffn import RouteStats
from moebius.model.ffn.balance.group import GroupLoss
from moebius.model.ffn.capacity import Capacity
from moebius.model.ffn.moe import MoE, MoELayer
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.part import Site
from moebius.model.weight import initialise
from moebius.monitor.meters import (
    Meter,
    budget_summary,
    gradient_ratio,
    load_metrics,
    router_similarity,
)
from moebius.monitor.tap import observing, scope, tap

WIDTH, LENGTH = 8, 12


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def approx(value: float) -> object:
    return pytest.approx(value, rel=1e-9, abs=1e-9)


# --- loads ----------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=12),
    st.lists(st.integers(0, 1000), max_size=4),
    st.lists(st.integers(0, 500), min_size=1, max_size=9),
)
@settings(max_examples=100, deadline=None)
def test_load_metrics_equal_numpy(ffn: list[int], zero: list[int], hist: list[int]) -> None:
    ffn[0] += 1
    hist[-1] += 1
    line = load_metrics(torch.tensor(ffn + zero), len(ffn), torch.tensor(hist))
    counts = np.array(ffn, float)
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * np.log(share)).sum()
    tokens = np.repeat(np.arange(len(hist)), hist)
    assert line["load_cv"] == approx(counts.std() / counts.mean())
    assert line["max_load"] == approx(counts.max() / counts.sum())
    assert line["entropy"] == approx(entropy)
    assert line["effective_experts"] == approx(np.exp(entropy))
    assert line["dead_experts"] == (counts == 0).sum()
    assert line["ffn_mean"] == approx(tokens.mean())
    assert line["ffn_std"] == pytest.approx(tokens.std(), abs=1e-6)
    every = np.array(ffn + zero, float)
    assert line["load"] == pytest.approx((every / every.sum()).tolist(), abs=1e-6)
    assert line["ffn_hist"] == pytest.approx([n / sum(hist) for n in hist], abs=1e-6)
    assert line["num_ffn"] == len(ffn)


@pytest.mark.parametrize(
    ("counts", "cv", "effective", "dead"),
    [([5, 5, 5, 5], 0.0, 4.0, 0), ([20, 0, 0, 0], math.sqrt(3), 1.0, 3), ([1, 1, 0, 0], 1, 2, 2)],
)
def test_known_loads(counts: list[int], cv: float, effective: float, dead: int) -> None:
    line = load_metrics(torch.tensor([*counts, 99]), 4, torch.tensor([0, 20]))
    assert line["load_cv"] == approx(cv)
    assert line["effective_experts"] == approx(effective)
    assert line["dead_experts"] == dead


def test_no_tokens_at_all_gives_finite_numbers() -> None:
    line = load_metrics(torch.zeros(6, dtype=torch.int64), 4, torch.zeros(4, dtype=torch.int64))
    numbers = [line[name] for name in ("load_cv", "max_load", "entropy", "ffn_mean", "ffn_std")]
    assert all(math.isfinite(number) for number in numbers)
    assert line["dead_experts"] == 4


# --- routers --------------------------------------------------------------------------------------


def test_router_similarity_equals_all_pairs() -> None:
    w_ED = noise(7, 5)
    rows = w_ED.tolist()
    pairs = []
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            if i != j:
                dot = sum(x * y for x, y in zip(a, b, strict=True))
                pairs.append(dot / (math.hypot(*a) * math.hypot(*b)))
    assert router_similarity(w_ED) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert router_similarity(w_ED[:1].expand(4, 5)) == pytest.approx(1.0, abs=1e-6)
    assert router_similarity(torch.eye(5)) == pytest.approx(0.0, abs=1e-6)


def config(renormalise: bool = False, capacity: Capacity | None = None) -> MoE:
    return MoE(
        experts=6,
        expert_width=4,
        top_k=3,
        zero_experts=3,
        ffn_per_token=2.0,
        scaling=2.0,
        router=Softmax(renormalise=renormalise),
        balance=(GroupLoss(0.2, scope="sequence"),),
        capacity=capacity,
    )


def build(moe: MoE) -> MoELayer:
    layer = moe.build(Site(WIDTH, 2, 0, 1e-5))
    assert isinstance(layer, MoELayer)
    initialise(layer, 0)
    return layer.double()


def batch(first: int, count: int) -> tuple[Tensor, Context, Tensor]:
    """Sequences of a global batch of 4, its context, and a direction that makes a loss."""
    rows = slice(first, first + count)
    ctx = Context.continuing(torch.zeros(4, LENGTH, dtype=torch.int64), 0)
    names = ("position_BT", "document_BT", "valid_BT", "attend_BTT", "sequence_B")
    part = dataclasses.replace(ctx, **{name: getattr(ctx, name)[rows] for name in names})
    return noise(4, LENGTH, WIDTH)[rows] + 0.3, part, noise(4, LENGTH, WIDTH, seed=1)[rows]


def observed(moe: MoELayer, size: int) -> tuple[Tensor, RouteStats]:
    """dL/dP as the meter sees it over micro-batches of a mean loss, and the stats."""
    meter, total = Meter(), None
    with observing(meter):
        for first in range(0, 4, size):
            x_BTD, ctx, seen_BTD = batch(first, size)
            with scope("layers/0"):
                y_BTD, stats = moe(x_BTD, ctx)
            ((y_BTD * seen_BTD).tanh().sum() / ctx.num_targets).backward()
            total = stats if total is None else total + stats
    grad_E = meter.score_gradient(0)
    assert grad_E is not None and total is not None and meter.score_gradient(1) is None
    return torch.nn.functional.pad(grad_E, (0, 9 - len(grad_E))), total


def shifted(moe: MoELayer) -> Tensor:
    """The same by autograd through a vector added to the scores of every token."""
    x_BTD, ctx, seen_BTD = batch(0, 4)
    x_ND, weights = x_BTD.flatten(0, 1), dict(moe.named_parameters())
    shift_E = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    score_NE = (x_ND @ weights["router.w_ED"].T).softmax(-1)
    before_NS = moe.router(x_ND, moe.bias_E()).index_NS
    after_NS = moe.begin(x_BTD, ctx).index_NS
    assert after_NS is not None
    score_NE = score_NE + shift_E
    rows = []
    for n, x_D in enumerate(x_ND):
        own = [score_NE[n, e] for e in before_NS[n].tolist()]
        renormalised = isinstance(moe.config.router, Softmax) and moe.config.router.renormalise
        total = torch.stack(own).sum() if renormalised else 1.0
        y_D = torch.zeros(WIDTH, dtype=torch.float64)
        for before, e in zip(before_NS[n].tolist(), after_NS[n].tolist(), strict=True):
            if e == 9:
                continue
            out_D = x_D
            if e < 6:
                gate_F, up_F = (weights["w_gate_up_E2FD"][e] @ x_D).chunk(2)
                out_D = weights["w_down_EDF"][e] @ (gate_F * gate_F.sigmoid() * up_F)
            y_D = y_D + 2.0 * score_NE[n, e] / (total if e == before else 1.0) * out_D
        rows.append(y_D)
    loss = (torch.stack(rows) * seen_BTD.flatten(0, 1)).tanh().sum() / (4 * LENGTH)
    return torch.autograd.grad(loss, shift_E)[0]


@pytest.mark.parametrize("size", [4, 1])
@pytest.mark.parametrize(
    ("renormalise", "capacity"),
    [
        (False, None),
        (True, None),
        (False, Capacity(0.6, "recycle")),
        (True, Capacity(0.6, "recycle")),
        (False, Capacity(0.6, "drop")),
    ],
)
def test_score_gradient_is_that_of_a_shift_of_every_token(
    renormalise: bool, capacity: Capacity | None, size: int
) -> None:
    """P moves by a vector when the scores of every token do (LongCat-Flash eq. 9)."""
    moe = build(config(renormalise, capacity))
    got_E, stats = observed(moe, size)
    want_E = shifted(moe)
    assert want_E.norm() > 1e-3
    torch.testing.assert_close(got_E, want_E)
    assert (int(stats.num_dropped + stats.num_recycled) > 5) == (capacity is not None)


def test_r_g_is_the_ratio_of_the_two_gradients() -> None:
    """By autograd the balance part lacks only what moves all probabilities alike: they sum to 1."""
    moe = build(dataclasses.replace(config(), balance=(GroupLoss(0.2),)))
    language_E, stats = observed(moe, 4)
    rule = moe.balance_rules()[0]
    balance_E = rule.probability_gradient(stats)
    assert balance_E is not None
    x_BTD, ctx, _ = batch(0, 4)
    route = moe.router(x_BTD.flatten(0, 1), moe.bias_E())
    loss = rule.loss(route, ctx)
    assert loss is not None
    (grad_NE,) = torch.autograd.grad(loss, route.score_NE)
    alike = (balance_E * route.score_NE.detach().mean(0)).sum()
    torch.testing.assert_close(grad_NE.sum(0), balance_E - alike)
    torch.testing.assert_close(alike, loss.detach())
    ratio = gradient_ratio(balance_E, language_E)
    assert ratio == approx(math.hypot(*balance_E.tolist()) / math.hypot(*shifted(moe).tolist()))


def test_r_g_of_nothing() -> None:
    assert gradient_ratio(torch.ones(3), None) is None
    assert gradient_ratio(torch.ones(3), torch.zeros(3)) is None
    assert gradient_ratio(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])) == 2.5


# --- hidden states --------------------------------------------------------------------------------


def test_hidden_rms_by_layer_over_micro_batches() -> None:
    meter = Meter()
    xs = [
        [noise(size, 6, seed=10 * layer + size) * (layer + 1) for size in (3, 5)]
        for layer in range(12)
    ]
    with observing(meter):
        for part in (0, 1):
            for layer in reversed(range(12)):
                with scope(f"layers/{layer}"):
                    tap("hidden", xs[layer][part])
                    tap("other", torch.full((4,), 1e6))
    wanted = [float(torch.cat(parts).square().mean().sqrt()) for parts in xs]
    assert meter.hidden_rms(12) == pytest.approx(wanted)


def test_hidden_rms_does_not_add_up_in_bf16() -> None:
    meter = Meter()
    with observing(meter), scope("layers/0"):
        tap("hidden", torch.full((100_000,), 3.0, dtype=torch.bfloat16))
    assert meter.hidden_rms(1) == [3.0]


def test_budget_summary_over_the_last_third() -> None:
    means = [9.0] * 6 + [3.0, 3.5, 1.5]
    lines = [{"layers": {"1": {"ffn_mean": mean, "ffn_std": mean / 10}}} for mean in means]
    summary = budget_summary(lines, {"1": 3.0}, window=2)
    assert summary == {
        "1": {
            "target": 3.0,
            "mean": pytest.approx(8.0 / 3),
            "worst_window": pytest.approx(2.5),  # of 3.25 and 2.5
            "std": pytest.approx(0.8 / 3),
        }
    }


def test_budget_summary_of_a_layer_that_came_later() -> None:
    old, new = {"ffn_mean": 2.0, "ffn_std": 0.1}, {"ffn_mean": 4.0, "ffn_std": 0.3}
    lines = [{"layers": {"0": old}}] * 2 + [{"layers": {"0": old, "1": new}}]
    summary = budget_summary(lines * 3, {"0": 3.0, "1": 3.0, "2": 3.0})
    assert summary["0"]["mean"] == 2.0
    assert summary["1"]["mean"] == 4.0 and summary["1"]["std"] == 0.3
    assert "2" not in summary
