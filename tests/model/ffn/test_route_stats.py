"""RouteStats: what they count, that they add up, and that recompute counts and routes once."""

import dataclasses

import pytest
import torch
from torch import Tensor

from moebius.model.ffn import RouteStats
from moebius.model.ffn.balance.budget import Budget
from moebius.model.ffn.balance.group import GroupLoss
from moebius.model.ffn.capacity import Capacity
from moebius.model.ffn.moe import MoE, MoELayer, balance_rules, routers_of
from moebius.model.recompute import recomputed

from .reference import build, context, noise, part, relative, route_stats

CONFIG = MoE(
    experts=6,
    expert_width=4,
    top_k=3,
    zero_experts=3,
    ffn_per_token=2.0,
    balance=(Budget(), GroupLoss(0.1, scope="sequence")),
)
VALID_BT = torch.arange(12) < torch.tensor([12, 5, 0, 9])[:, None]


def fields(stats: RouteStats) -> dict[str, Tensor]:
    return {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}


def stats_of(moe: MoELayer) -> RouteStats:
    return moe(noise(4, 12, 8), context(4, 12, valid_BT=VALID_BT))[1]


def test_stats_count_valid_tokens_only() -> None:
    moe = build(CONFIG, 8)
    stats, ctx = stats_of(moe), context(4, 12, valid_BT=VALID_BT)
    assert int(stats.num_tokens) == 26 and int(stats.count_E.sum()) == 26 * 3
    route = moe.router(noise(4, 12, 8).flatten(0, 1), moe.bias_E())
    wanted = route_stats(route, ctx)
    assert stats.count_E.tolist() == wanted.count_E.tolist()
    torch.testing.assert_close(stats.score_sum_E, wanted.score_sum_E)
    picks = (route.index_NS < 6).sum(-1)[VALID_BT.flatten()].tolist()
    assert stats.hist_S.tolist() == [picks.count(s) for s in range(4)]
    assert not stats.score_sum_E.requires_grad


@pytest.mark.parametrize("capacity", [None, Capacity(0.5, "drop"), Capacity(0.5, "recycle")])
def test_stats_of_micro_batches_add_up(capacity: Capacity | None) -> None:
    moe = build(dataclasses.replace(CONFIG, capacity=capacity), 8)
    ctx = context(4, 12, valid_BT=VALID_BT)
    pieces = [moe(noise(4, 12, 8)[b : b + 1], part(ctx, b, b + 1))[1] for b in range(4)]
    total, whole = pieces[0] + pieces[1] + pieces[2] + pieces[3], stats_of(moe)
    for name, wanted in fields(whole).items():
        got = fields(total)[name]
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        if got.dtype == torch.int64:
            assert torch.equal(got, wanted), name
        else:
            torch.testing.assert_close(got, wanted)
    assert (int(whole.num_dropped + whole.num_recycled) > 0) == (capacity is not None)


def run(
    moe: MoELayer, x_BTD: Tensor, recompute: bool, nudge_BTD: Tensor | float = 0.0
) -> tuple[RouteStats, list[Tensor], int]:
    """Stats, gradients, and how often the layer ran; a second pass sees its input nudged."""
    passes: list[Tensor] = []

    def layer(x_BTD: Tensor) -> tuple[Tensor, RouteStats]:
        passes.append(x_BTD)
        return moe(x_BTD if len(passes) == 1 else x_BTD + nudge_BTD, context(4, 12))

    x_BTD = x_BTD.clone().requires_grad_()
    y_BTD, stats = (recomputed(layer) if recompute else layer)(x_BTD)
    leaves = [x_BTD, *moe.parameters()]
    grads = torch.autograd.grad((y_BTD * noise(4, 12, 8, seed=1)).sum(), leaves)
    return stats, list(grads), len(passes)


@pytest.mark.parametrize("capacity", [None, Capacity(0.5, "recycle")])
def test_recompute_counts_once_and_gives_the_same_gradients(capacity: Capacity | None) -> None:
    moe = build(dataclasses.replace(CONFIG, capacity=capacity), 8)
    plain, grads, once = run(moe, noise(4, 12, 8), False)
    again, regrads, twice = run(moe, noise(4, 12, 8), True)
    assert (once, twice) == (1, 2)
    assert int(again.count_E.sum()) == 4 * 12 * 3
    for name, wanted in fields(plain).items():
        assert torch.equal(fields(again)[name], wanted), name
    assert all(torch.equal(a, b) for a, b in zip(regrads, grads, strict=True))


def test_near_ties_do_not_flip_when_recomputed() -> None:
    """Experts 2i and 2i + 1 differ by the last input only, which a nudge decides."""
    moe = build(dataclasses.replace(CONFIG, balance=()), 8)
    with torch.no_grad():
        rows_ED = dict(moe.named_parameters())["router.w_ED"]
        rows_ED[1:9:2] = rows_ED[0:8:2]
        rows_ED[1:9:2, -1] += 1.0
    x_BTD, nudge_BTD = noise(4, 12, 8), torch.zeros(4, 12, 8, dtype=torch.float64)
    x_BTD[..., -1] *= 1e-12
    nudge_BTD[..., -1] = 1e-9 * noise(4, 12, seed=7)
    ctx = context(4, 12)
    first, second = (moe.begin(x, ctx).index_NS for x in (x_BTD, x_BTD + nudge_BTD))
    assert first is not None and second is not None
    flipped = (first.sort().values != second.sort().values).any(-1)
    assert flipped.sum() > 10, "too few tokens are near a tie"
    still, nudged = (run(moe, x_BTD, True, nudge)[1] for nudge in (0.0, nudge_BTD))
    for got, want in zip(nudged, still, strict=True):
        assert relative(got, want) < 1e-6


def test_routers_and_rules_of_a_block_come_in_order() -> None:
    moes = torch.nn.ModuleList([build(CONFIG, 8, layer=i) for i in range(2)])
    assert [moe.layer for moe in routers_of(moes)] == [0, 1]
    assert [len(rules) for rules in balance_rules(moes)] == [2, 2]
