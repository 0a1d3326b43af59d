"""Balance losses against their equations written as loops, in every scope: values and gradients."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moebius.model.context import Context
from moebius.model.ffn.balance import BalanceConfig, BalanceRule, Layout
from moebius.model.ffn.balance.group import GroupLoss
from moebius.model.ffn.balance.load import Scope
from moebius.model.ffn.balance.router_z import RouterZ
from moebius.model.ffn.balance.switch import SwitchLoss
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers import Route
from moebius.model.ffn.routers.sigmoid import Sigmoid
from moebius.model.ffn.routers.softmax import Softmax

from .reference import build, context, noise, part, random_route, relative, route_of, route_stats

LAYOUT = Layout(num_ffn=6, num_zero=3, top_k=3, ffn_per_token=2.0)
BATCH, LENGTH = 4, 7
SCOPES: tuple[Scope, ...] = ("sequence", "micro_batch", "global")
ALPHA = 0.3


def rule_of(config: BalanceConfig, layout: Layout = LAYOUT) -> BalanceRule:
    return config.build(layout).double()


def loss_of(rule: BalanceRule, route: Route, ctx: Context) -> Tensor:
    loss = rule.loss(route, ctx)
    assert loss is not None
    return loss


def ragged() -> Context:
    """Sequences of unequal numbers of valid tokens, a part of a larger global batch."""
    valid_BT = torch.arange(LENGTH) < torch.tensor([LENGTH, 3, 5, 1])[:, None]
    return context(BATCH, LENGTH, valid_BT=valid_BT, num_targets=29)


def flat_groups(config: BalanceConfig, layout: Layout = LAYOUT) -> list[tuple[list[int], float]]:
    """The groups of LongCat-Flash eq. 3-5 (or Switch's) with the slots a token should give each."""
    outputs = range(layout.num_outputs)
    if isinstance(config, SwitchLoss):
        return [([e], layout.top_k / layout.num_outputs) for e in outputs]
    assert isinstance(config, GroupLoss)
    num_groups = config.groups or layout.num_ffn
    size = layout.num_ffn // num_groups
    groups = [
        ([e for e in outputs if e < layout.num_ffn and e // size == j], target)
        for j, target in enumerate([layout.ffn_per_token / num_groups] * num_groups)
    ]
    if layout.num_zero:
        rest = [e for e in outputs if e >= layout.num_ffn]
        groups.append((rest, layout.top_k - layout.ffn_per_token))
    return groups


def by_loops(
    config: GroupLoss | SwitchLoss, route: Route, ctx: Context, count_from: Route | None = None
) -> Tensor:
    """alpha * sum_j f_j P_j over each scope's tokens, the scopes weighted by their valid tokens."""
    tokens = [
        [b * LENGTH + t for t in range(LENGTH) if ctx.valid_BT[b, t]]
        for b in range(len(ctx.valid_BT))
    ]
    every = [n for sequence in tokens for n in sequence]
    units = tokens if config.scope == "sequence" else [every]
    chosen = (count_from or route).index_NS.tolist()
    total = torch.zeros((), dtype=torch.float64)
    for unit in units:
        for group, target in flat_groups(config):
            picked = sum(e in group for n in unit for e in chosen[n])
            load = picked / (target * len(unit))
            for n in unit:
                prob_E = route.score_NE[n] / route.score_NE[n].sum()
                for e in group:
                    total = total + load * prob_E[e]
    return config.coefficient * total / float(ctx.num_targets)


LOAD_LOSSES = [
    *(GroupLoss(ALPHA, scope=scope) for scope in SCOPES),
    *(GroupLoss(ALPHA, groups=2, scope=scope) for scope in SCOPES),
    GroupLoss(ALPHA, groups=1, scope="sequence"),
    *(SwitchLoss(ALPHA, scope=scope) for scope in SCOPES),
]


@pytest.mark.parametrize("config", LOAD_LOSSES, ids=str)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_load_losses_equal_their_equations(config: GroupLoss | SwitchLoss, kind: str) -> None:
    """The global scope counts the previous global batch; told of this one, it equals it."""
    rule, ctx = rule_of(config), ragged()
    logit_NE = noise(BATCH * LENGTH, 9).requires_grad_()
    route = route_of(logit_NE, 3, kind)
    rule.after_step(route_stats(route, ctx), 0)
    loss, wanted = loss_of(rule, route, ctx), by_loops(config, route, ctx)
    torch.testing.assert_close(loss, wanted)
    got, want = (torch.autograd.grad(x, logit_NE, retain_graph=True)[0] for x in (loss, wanted))
    assert want.norm() > 1e-4
    torch.testing.assert_close(got, want)
    assert not got[~ctx.valid_BT.flatten()].any()


@pytest.mark.parametrize("config", [GroupLoss(ALPHA, 2, "global"), SwitchLoss(ALPHA)], ids=str)
def test_global_scope_uses_the_loads_of_the_previous_global_batch(
    config: GroupLoss | SwitchLoss,
) -> None:
    rule, ctx = rule_of(config), context(BATCH, LENGTH)
    past, now = (random_route(BATCH * LENGTH, 9, 3, seed) for seed in (1, 2))
    assert float(loss_of(rule, now, ctx)) == pytest.approx(ALPHA), "uniform before the first"
    rule.after_step(route_stats(past, ctx), 0)
    wanted = by_loops(config, now, ctx, count_from=past)
    torch.testing.assert_close(loss_of(rule, now, ctx), wanted)
    torch.testing.assert_close(loss_of(rule, now, ctx), wanted, msg="a forward moved the loads")
    assert (wanted - by_loops(config, now, ctx)).abs() > 1e-4


@st.composite
def at_target(draw: st.DrawFn) -> tuple[Layout, int, list[list[int]]]:
    """A layout, a divisor of its FFN experts, and the experts of N tokens, all at target load."""
    num_ffn = draw(st.integers(1, 8))
    ffn_per_token = draw(st.integers(1, num_ffn))
    spare = draw(st.integers(0, 3))
    zero = spare + draw(st.integers(0, 3)) if spare else 0
    layout = Layout(num_ffn, zero, ffn_per_token + spare, float(ffn_per_token))
    groups = draw(st.sampled_from([d for d in range(1, num_ffn + 1) if num_ffn % d == 0]))
    rows = [
        [(t * ffn_per_token + k) % num_ffn for k in range(ffn_per_token)]
        + draw(st.permutations(range(num_ffn, num_ffn + zero)))[:spare]
        for t in range(num_ffn)
    ]
    return layout, groups, rows


@given(at_target(), st.sampled_from(SCOPES), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_group_loss_is_alpha_at_target_load_whatever_the_scores(
    case: tuple[Layout, int, list[list[int]]], scope: Scope, seed: int
) -> None:
    layout, groups, rows = case
    route = random_route(2 * layout.num_ffn, layout.num_outputs, layout.top_k, seed)
    route = dataclasses.replace(route, index_NS=torch.tensor(2 * rows))
    ctx = context(2, layout.num_ffn)
    rule = rule_of(GroupLoss(ALPHA, groups, scope), layout)
    assert float(loss_of(rule, route, ctx)) == pytest.approx(ALPHA)
    rule.after_step(route_stats(route, ctx), 0)
    assert float(loss_of(rule, route, ctx)) == pytest.approx(ALPHA)


def test_zero_group_counts_slots_not_tokens() -> None:
    """A token with two zero experts counts twice; an indicator would saturate."""
    layout = Layout(num_ffn=2, num_zero=2, top_k=2, ffn_per_token=1.0)
    score_NE = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    index_NS = torch.tensor([[2, 3]])
    route = Route(score_NE.log(), score_NE, index_NS, score_NE.gather(-1, index_NS))
    rule = rule_of(GroupLoss(1.0, groups=1), layout)
    assert float(loss_of(rule, route, context(1, 1))) == pytest.approx(2 * 0.7)


def test_sequence_scope_is_the_loss_of_deepseek_v3() -> None:
    """2412.19437 eq. 17-20, its mean over sequences of equal length, on sigmoid scores."""
    layout = Layout(num_ffn=8, num_zero=0, top_k=2, ffn_per_token=2.0)
    route = random_route(BATCH * LENGTH, 8, 2, seed=3, kind="sigmoid")
    losses = []
    for b in range(BATCH):
        rows = range(b * LENGTH, (b + 1) * LENGTH)
        loss = 0.0
        for i in range(8):
            f = 8 / (2 * LENGTH) * sum(i in route.index_NS[t].tolist() for t in rows)
            p = sum(float(route.score_NE[t, i]) / float(route.score_NE[t].sum()) for t in rows)
            loss += ALPHA * f * p / LENGTH
        losses.append(loss)
    for config in (SwitchLoss(ALPHA, "sequence"), GroupLoss(ALPHA, scope="sequence")):
        got = loss_of(rule_of(config, layout), route, context(BATCH, LENGTH))
        assert float(got) == pytest.approx(sum(losses) / BATCH)


@pytest.mark.parametrize("config", LOAD_LOSSES, ids=str)
def test_scaling_all_scores_changes_nothing(config: GroupLoss | SwitchLoss) -> None:
    """A sigmoid router cannot lower the loss by shrinking its scores (Megatron issue 1545)."""
    rule, ctx = rule_of(config), ragged()
    route = random_route(BATCH * LENGTH, 9, 3, seed=4, kind="sigmoid")
    rule.after_step(route_stats(route, ctx), 0)
    score_NE = route.score_NE.requires_grad_()
    loss = loss_of(rule, route, ctx)
    for factor in (0.5, 1e-3):
        less = dataclasses.replace(route, score_NE=score_NE * factor)
        torch.testing.assert_close(loss_of(rule, less, ctx), loss)
    (grad_NE,) = torch.autograd.grad(loss, score_NE)
    along_N = (grad_NE * score_NE).sum(-1)
    assert grad_NE.norm() > 1e-3 and along_N.abs().max() < 1e-12


def test_router_z_equals_its_equation() -> None:
    ctx = ragged()
    logit_NE = (noise(BATCH * LENGTH, 9) * 3).requires_grad_()
    route = route_of(logit_NE, 3)
    valid = ctx.valid_BT.flatten().tolist()
    wanted = torch.zeros((), dtype=torch.float64)
    for row_E, keep in zip(logit_NE, valid, strict=True):
        wanted = wanted + keep * row_E.exp().sum().log() ** 2
    wanted = 0.02 * wanted / 29
    loss = loss_of(rule_of(RouterZ(0.02)), route, ctx)
    torch.testing.assert_close(loss, wanted)
    got, want = (torch.autograd.grad(x, logit_NE, retain_graph=True)[0] for x in (loss, wanted))
    torch.testing.assert_close(got, want)


def split_loss(config: BalanceConfig, size: int) -> tuple[Tensor, Tensor]:
    """The loss of a ragged batch in micro-batches of `size` sequences, and its gradient."""
    rule, ctx = rule_of(config), ragged()
    rule.after_step(route_stats(random_route(BATCH * LENGTH, 9, 3, seed=9), ctx), 0)
    logit_NE = noise(BATCH * LENGTH, 9).requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(0, BATCH, size):
        route = route_of(logit_NE[i * LENGTH : (i + size) * LENGTH], 3)
        total = total + loss_of(rule, route, part(ctx, i, i + size))
    return total, torch.autograd.grad(total, logit_NE)[0]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "config",
    [
        GroupLoss(ALPHA, scope="sequence"),
        SwitchLoss(ALPHA, scope="sequence"),
        GroupLoss(ALPHA, 3, "global"),
        SwitchLoss(ALPHA, "global"),
        RouterZ(ALPHA),
    ],
    ids=str,
)
def test_the_micro_batch_split_changes_nothing(config: BalanceConfig, size: int) -> None:
    """Also not by a factor of the micro-batch size (Megatron issue 5798)."""
    for got, want in zip(split_loss(config, size), split_loss(config, BATCH), strict=True):
        torch.testing.assert_close(got, want)


def test_micro_batch_scope_is_what_it_says() -> None:
    whole, parts = (split_loss(GroupLoss(ALPHA), size)[0] for size in (BATCH, 1))
    torch.testing.assert_close(parts, split_loss(GroupLoss(ALPHA, scope="sequence"), BATCH)[0])
    assert (whole - parts).abs() > 1e-3


RULES: tuple[BalanceConfig, ...] = (
    GroupLoss(0.3, scope="sequence"),
    SwitchLoss(0.2, scope="micro_batch"),
    RouterZ(0.1),
)


@pytest.mark.parametrize("router", [Softmax(), Sigmoid(renormalise=True)], ids=str)
def test_the_router_gets_exactly_the_gradient_of_the_closed_form(
    router: Softmax | Sigmoid,
) -> None:
    """Not thrown away (AutoModel issue 1408), not counted twice (TRL issue 4070)."""
    bare = MoE(6, 4, 3, zero_experts=3, ffn_per_token=2.0, router=router, scaling=3.0)
    ctx, seen_BTD = context(BATCH, LENGTH, num_targets=100), noise(BATCH, LENGTH, 8, seed=1)
    grads, outputs = [], []
    for config in (dataclasses.replace(bare, balance=RULES), bare):
        moe, x_BTD = build(config, 8), noise(BATCH, LENGTH, 8).requires_grad_()
        y_BTD, _ = moe(x_BTD, ctx)
        leaves = [x_BTD, *moe.parameters()]
        grads.append(torch.autograd.grad((y_BTD * seen_BTD).sum(), leaves))
        outputs.append(y_BTD)
    assert torch.equal(*outputs), "the output is changed by a loss"

    moe, x_BTD = build(bare, 8), noise(BATCH, LENGTH, 8).requires_grad_()
    route = moe.router(x_BTD.flatten(0, 1), moe.bias_E())
    closed = 0.1 * (route.logit_NE.exp().sum(-1).log() ** 2).sum() / 100
    for config in RULES:
        if isinstance(config, GroupLoss | SwitchLoss):
            closed = closed + by_loops(config, route, ctx)
    leaves = [x_BTD, *moe.parameters()]
    wanted = torch.autograd.grad(closed, leaves, allow_unused=True)
    assert sum(grad is not None for grad in wanted) == 2
    for with_loss, without, want in zip(*grads, wanted, strict=True):
        if want is None:
            assert torch.equal(with_loss, without)
        else:
            assert relative(with_loss - without, want) < 1e-10


@pytest.mark.parametrize("config", LOAD_LOSSES, ids=str)
def test_probability_gradient_is_that_of_the_loss(config: GroupLoss | SwitchLoss) -> None:
    """At fixed loads the loss is linear in P: E independent P give its gradient by a solve."""
    rule, ctx = rule_of(config), context(BATCH, LENGTH)
    route = random_route(BATCH * LENGTH, 9, 3, seed=5)
    stats = route_stats(route, ctx)
    rule.after_step(stats, 0)
    prob_XE = noise(9, 9, seed=6).softmax(-1)
    losses = [
        loss_of(rule, dataclasses.replace(route, score_NE=p_E.expand(BATCH * LENGTH, 9)), ctx)
        for p_E in prob_XE
    ]
    grad_E = rule.probability_gradient(stats)
    assert grad_E is not None
    torch.testing.assert_close(grad_E, torch.linalg.solve(prob_XE, torch.stack(losses)))


def test_rules_without_a_load_loss_have_no_probability_gradient() -> None:
    route, ctx = random_route(4, 9, 3, seed=0), context(1, 4)
    assert rule_of(RouterZ()).probability_gradient(route_stats(route, ctx)) is None


@pytest.mark.parametrize("groups", [4, 7, 0, -2])
def test_groups_that_do_not_divide_are_refused(groups: int) -> None:
    with pytest.raises(ValueError, match=rf"groups \({groups}\) must divide the 6 FFN experts"):
        GroupLoss(groups=groups).build(LAYOUT)
