"""Expert capacity: its limit, dropping against a loop, and what recycle routing promises."""

import dataclasses
import itertools
import math
from fractions import Fraction
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.model.context import Context
from moebius.model.ffn.balance import Layout
from moebius.model.ffn.capacity import Capacity, Fitted, fit
from moebius.model.ffn.moe import MoE, MoELayer
from moebius.model.ffn.routers import Route, Selection

from .reference import build, context, noise, part, swiglu_by_loops, weights_of

Overflow = Literal["drop", "recycle"]
OVERFLOWS: tuple[Overflow, ...] = ("drop", "recycle")
MOE = MoE(
    experts=6,
    expert_width=4,
    top_k=3,
    zero_experts=2,
    ffn_per_token=2.0,
    scaling=2.0,
    capacity=Capacity(0.75, "recycle"),
)


def num_changed(route: Route, fitted: Fitted) -> int:
    return int((route.index_NS != fitted.index_NS).sum())


@given(
    st.integers(1, 400),
    st.integers(0, 3000),
    st.integers(1, 64),
    st.integers(1, 120),
)
@settings(max_examples=200, deadline=None)
def test_limit_is_the_ceiling_of_factor_times_mean_load(
    percent: int, tokens: int, num_ffn: int, tenths: int
) -> None:
    layout = Layout(num_ffn, 4, 12, tenths / 10)
    exact = Fraction(percent, 100) * tokens * Fraction(tenths, 10) / num_ffn
    assert Capacity(percent / 100).limit(tokens, layout) == math.ceil(exact)


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_a_factor_must_be_positive(factor: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        Capacity(factor)


@dataclasses.dataclass(frozen=True)
class Case:
    """A capacity, and a lopsided routing of a ragged batch."""

    capacity: Capacity
    layout: Layout
    route: Route
    ctx: Context

    def scopes(self) -> list[range]:
        batch, length = self.ctx.valid_BT.shape
        if self.capacity.scope == "micro_batch":
            return [range(batch * length)]
        return [range(b * length, (b + 1) * length) for b in range(batch)]

    def fitted(self) -> Fitted:
        return fit(self.capacity, self.layout, self.route, self.ctx, layer=1)

    def over(self) -> set[tuple[int, int]]:
        """The assignments (token, slot) past the limit, counted in token order, scope by scope."""
        over: set[tuple[int, int]] = set()
        valid = self.ctx.valid_BT.flatten().tolist()
        for scope in self.scopes():
            exact = Fraction(self.capacity.factor) * sum(valid[n] for n in scope)
            limit = math.ceil(exact * Fraction(self.layout.ffn_per_token) / self.layout.num_ffn)
            taken = [0] * self.layout.num_outputs
            for n in scope:
                for slot, e in enumerate(self.route.index_NS[n].tolist()):
                    if valid[n] and e < self.layout.num_ffn:
                        taken[e] += 1
                        if taken[e] > limit:
                            over.add((n, slot))
        return over


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_ffn, num_zero = draw(st.integers(1, 6)), draw(st.integers(0, 3))
    outputs = num_ffn + num_zero
    top_k = draw(st.integers(1, outputs))
    budget = draw(st.sampled_from([0.5, 1.0, float(top_k)]))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    factor = draw(st.sampled_from([0.25, 0.5, 1.0, 1.25, 2.0]))
    seed = draw(st.integers(0, 10_000))
    score_NE = (noise(batch * length, outputs, seed=seed) - torch.arange(outputs)).softmax(-1)
    renormalise = draw(st.booleans()) and top_k > 1
    route = Selection(top_k, renormalise)(score_NE.log(), score_NE, torch.zeros(outputs))
    valid_BT = noise(batch, length, seed=seed + 1) > draw(st.sampled_from([-9.0, -0.5, 9.0]))
    ctx = context(batch, length, valid_BT=valid_BT, step=draw(st.integers(0, 9)))
    scope: Literal["sequence", "micro_batch"] = draw(st.sampled_from(["sequence", "micro_batch"]))
    capacity = Capacity(factor, draw(st.sampled_from(OVERFLOWS)), scope)
    return Case(capacity, Layout(num_ffn, num_zero, top_k, budget), route, ctx)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_no_expert_exceeds_its_capacity_and_everything_is_counted(case: Case) -> None:
    fitted, over = case.fitted(), case.over()
    layout, outputs = case.layout, case.layout.num_outputs
    dropped = recycled = 0
    for n, slot in itertools.product(*map(range, fitted.index_NS.shape)):
        before, after = int(case.route.index_NS[n, slot]), int(fitted.index_NS[n, slot])
        weight = float(fitted.weight_NS[n, slot])
        if (n, slot) not in over:
            assert after == before, "what fits stays where it is"
            assert weight == float(case.route.weight_NS[n, slot])
        elif after == outputs:
            dropped += 1
            assert weight == 0.0
        else:
            recycled += 1
            assert after < layout.num_ffn and case.capacity.overflow == "recycle"
            assert weight == float(case.route.score_NE[n, after])
    assert (int(fitted.num_dropped), int(fitted.num_recycled)) == (dropped, recycled)
    valid = case.ctx.valid_BT.flatten().tolist()
    for scope in case.scopes():
        limit = case.capacity.limit(sum(valid[n] for n in scope), layout)
        landed = [e for n in scope if valid[n] for e in fitted.index_NS[n].tolist()]
        assert all(landed.count(e) <= limit for e in range(layout.num_ffn))
    for row in fitted.index_NS.tolist():
        held = [e for e in row if e < outputs]
        assert len(held) == len(set(held)), "a token holds an expert twice"


@given(cases())
@settings(max_examples=80, deadline=None)
def test_recycling_one_expert_a_token_loses_nothing(case: Case) -> None:
    """With a factor of at least 1 and top-1 every overflow finds a slot (Hunyuan-Large)."""
    num_ffn = case.layout.num_ffn
    layout = Layout(num_ffn, 0, 1, 1.0)
    factor = max(1.0, case.capacity.factor)
    capacity = dataclasses.replace(case.capacity, factor=factor, overflow="recycle")
    score_NE = case.route.score_NE[:, :num_ffn]
    route = Selection(1)(score_NE.log(), score_NE, torch.zeros(num_ffn))
    own = Case(capacity, layout, route, case.ctx)
    fitted = own.fitted()
    assert int(fitted.num_dropped) == 0
    assert int(fitted.num_recycled) == len(own.over())


def test_two_overflows_of_a_token_do_not_land_on_one_expert() -> None:
    """Experts 0 and 1 are full; only expert 2 has room, and a token may take it once."""
    layout = Layout(num_ffn=3, num_zero=0, top_k=2, ffn_per_token=2.0)
    score_NE = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).expand(6, 3)
    route = Selection(2)(score_NE.log(), score_NE, torch.zeros(3))
    fitted = fit(Capacity(0.75, "recycle"), layout, route, context(1, 6), 0)
    assert fitted.index_NS[:3].tolist() == [[0, 1]] * 3
    assert [sorted(row) for row in fitted.index_NS[3:].tolist()] == [[2, 3], [2, 3], [3, 3]]
    assert (int(fitted.num_dropped), int(fitted.num_recycled)) == (4, 2)


def crowded(num_scopes: int) -> tuple[Capacity, Layout, Route, list[int]]:
    """Equal sequences of 16 tokens over 6 experts; four overflow; the free slots by expert."""
    choices = [0] * 8 + [1] * 3 + [2] * 2 + [3, 4, 5]
    score_NE = torch.full((16, 6), 0.1, dtype=torch.float64)
    score_NE[range(16), choices] = 0.5
    score_NE = score_NE.repeat(num_scopes, 1)
    route = Selection(1)(score_NE.log(), score_NE, torch.zeros(6))
    return Capacity(1.5, "recycle"), Layout(6, 0, 1, 1.0), route, [0, 1, 2, 3, 3, 3]


def chi_square(counts: list[int], weights: list[int]) -> float:
    expected = [sum(counts) * weight / sum(weights) for weight in weights]
    assert all(c == 0 for c, e in zip(counts, expected, strict=True) if e == 0)
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True) if e)


def test_recycling_is_uniform_over_free_slots() -> None:
    """Chi-square of each overflow's landing over 600 sequences; 18.5 is its 0.1 % point."""
    num_scopes = 600
    capacity, layout, route, free = crowded(num_scopes)
    fitted = fit(capacity, layout, route, context(num_scopes, 16), 0)
    assert (int(fitted.num_dropped), int(fitted.num_recycled)) == (0, 4 * num_scopes)
    landed = fitted.index_NS.view(num_scopes, 16)[:, 4:8].T.tolist()
    for one in landed:
        counts = [one.count(e) for e in range(6)]
        assert chi_square(counts, free) < 18.5
        assert chi_square(counts, [0, 1, 1, 1, 1, 1]) > 40, "the test could not tell the difference"


def landing(step: int, layer: int, first: int, scope: str = "sequence") -> list[list[int]]:
    capacity, layout, route, _ = crowded(8)
    capacity = dataclasses.replace(capacity, scope=scope)
    return (
        fit(capacity, layout, route, context(8, 16, first=first, step=step), layer)
        .index_NS.view(8, 16)
        .tolist()
    )


@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
def test_randomness_comes_from_step_layer_and_sequence(scope: str) -> None:
    base = landing(5, 2, 40, scope)
    torch.manual_seed(123)
    assert landing(5, 2, 40, scope) == base, "torch's own random state plays no part"
    others = [landing(6, 2, 40, scope), landing(5, 3, 40, scope), landing(5, 2, 48, scope)]
    assert base not in others
    assert all(a != b for a, b in itertools.combinations(others, 2))
    if scope == "sequence":
        assert landing(5, 2, 41)[:7] == base[1:], "a sequence keeps its landing wherever it lies"


def routed(moe: MoELayer, size: int) -> tuple[list[list[int]], list[int]]:
    """Indices of a ragged global batch of 8 sequences in micro-batches, and what was counted."""
    valid_BT = torch.arange(16) < torch.tensor([16, 9, 16, 4, 16, 16, 1, 12])[:, None]
    x_BTD, ctx = noise(8, 16, 8) + 0.7, context(8, 16, valid_BT=valid_BT, first=24, step=3)
    index: list[list[int]] = []
    counted = torch.zeros(3, dtype=torch.int64)
    for i in range(0, 8, size):
        pending = moe.begin(x_BTD[i : i + size], part(ctx, i, i + size))
        assert pending.index_NS is not None and pending.stats is not None
        index += pending.index_NS.tolist()
        stats = pending.stats
        counted += torch.stack([stats.num_tokens, stats.num_dropped, stats.num_recycled])
    return index, counted.tolist()


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_sequence_scope_does_not_change_with_the_micro_batch_split(overflow: Overflow) -> None:
    moe = build(dataclasses.replace(MOE, capacity=Capacity(0.75, overflow)), 8)
    whole = routed(moe, 8)
    assert whole[1][0] == 90 and whole[1][1 if overflow == "drop" else 2] > 20
    assert routed(moe, 4) == whole and routed(moe, 2) == whole and routed(moe, 1) == whole


def test_micro_batch_scope_does_change() -> None:
    moe = build(dataclasses.replace(MOE, capacity=Capacity(0.75, "drop", "micro_batch")), 8)
    assert routed(moe, 8) != routed(moe, 1)


def test_dropless_is_the_default_and_what_evaluation_does() -> None:
    assert MoE(4, 4, 2).capacity is None
    tight = build(MOE, 8)
    free = build(dataclasses.replace(MOE, capacity=None), 8)
    x_BTD, ctx = noise(4, 16, 8), context(4, 16)
    y_BTD, stats = free(x_BTD, ctx)
    assert int(stats.num_dropped) == int(stats.num_recycled) == 0
    trained_BTD, trained = tight(x_BTD, ctx)
    assert not torch.allclose(trained_BTD, y_BTD) and int(trained.num_recycled) > 0
    assert torch.equal(trained.count_E, stats.count_E), "loads are counted before the cut"
    evaluated_BTD, evaluated = tight.eval()(x_BTD, ctx)
    assert torch.equal(evaluated_BTD, y_BTD)
    assert int(evaluated.num_dropped) == int(evaluated.num_recycled) == 0


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_values_and_gradients_follow_where_tokens_landed(overflow: Overflow) -> None:
    config = dataclasses.replace(MOE, capacity=Capacity(0.5, overflow))
    moe, ctx = build(config, 8), context(2, 6, step=1)
    x_BTD = noise(2, 6, 8, seed=1).requires_grad_()
    pending = moe.begin(x_BTD, ctx)
    y_BTD, stats = moe.finish(moe.compute(pending))
    assert stats is not None and int(stats.num_dropped + stats.num_recycled) > 5
    (y_BTD * noise(2, 6, 8, seed=2)).sum().backward()

    weights, own_BTD = weights_of(moe), x_BTD.detach().clone().requires_grad_()
    rows = []
    assert pending.index_NS is not None
    for x_D, chosen in zip(own_BTD.flatten(0, 1), pending.index_NS.tolist(), strict=True):
        score_E = (weights["router.w_ED"] @ x_D).softmax(-1)
        y_D = torch.zeros_like(x_D)
        for e in (e for e in chosen if e < 8):
            w_gate_up, w_down = (weights[name] for name in ("w_gate_up_E2FD", "w_down_EDF"))
            out_D = swiglu_by_loops(x_D, w_gate_up[e], w_down[e]) if e < 6 else x_D
            y_D = y_D + 2.0 * score_E[e] * out_D
        rows.append(y_D)
    want_ND = torch.stack(rows)
    (want_ND * noise(2, 6, 8, seed=2).flatten(0, 1)).sum().backward()
    torch.testing.assert_close(y_BTD.flatten(0, 1), want_ND)
    torch.testing.assert_close(x_BTD.grad, own_BTD.grad)
    for name, weight in moe.named_parameters():
        torch.testing.assert_close(weight.grad, weights[name].grad, msg=name)
