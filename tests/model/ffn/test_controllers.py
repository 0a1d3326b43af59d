"""The bias controllers: one step in closed form, a PID written here, and where they lead."""

import dataclasses
import functools
import operator
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moebius.model.ffn import RouteStats
from moebius.model.ffn.balance import BalanceConfig, BalanceRule, Layout
from moebius.model.ffn.balance.budget import Budget
from moebius.model.ffn.balance.sign import Sign
from moebius.model.ffn.moe import MoE

from .reference import build, context, noise, part, stats_of

LAYOUT = Layout(num_ffn=6, num_zero=2, top_k=3, ffn_per_token=2.0)
TOKENS = 48


def rule_of(config: BalanceConfig, layout: Layout = LAYOUT) -> BalanceRule:
    return config.build(layout).double()


def bias_of(rule: BalanceRule) -> Tensor:
    bias_E = rule.bias_E()
    assert bias_E is not None
    return bias_E


def random_counts(seed: int, layout: Layout = LAYOUT, tokens: int = TOKENS) -> list[int]:
    """Counts of `tokens` random routings."""
    index_NS = noise(tokens, layout.num_outputs, seed=seed).topk(layout.top_k).indices
    return torch.bincount(index_NS.flatten(), minlength=layout.num_outputs).tolist()


def errors(counts: list[int], layout: Layout = LAYOUT, tokens: int = TOKENS) -> list[float]:
    """LongCat-Flash eq. 2: K_e / (K N) - T_i / (K T), 0 for zero experts."""
    target = layout.ffn_per_token / layout.top_k / layout.num_ffn
    shares = [count / (layout.top_k * tokens) for count in counts]
    ffn = [target - share for share in shares[: layout.num_ffn]]
    return ffn + [0.0] * layout.num_zero


def test_budget_moves_by_its_closed_form() -> None:
    rule, counts = rule_of(Budget(mu=0.3)), random_counts(0)
    rule.after_step(stats_of(counts, TOKENS), 0)
    assert bias_of(rule).tolist() == pytest.approx([0.3 * e for e in errors(counts)], abs=1e-15)
    assert max(map(abs, bias_of(rule).tolist())) > 1e-3


def test_mean_gain_multiplies_what_all_ffn_experts_share() -> None:
    rule, counts = rule_of(Budget(mu=0.1, mean_gain=7.0)), random_counts(3)
    rule.after_step(stats_of(counts, TOKENS), 0)
    error = errors(counts)[: LAYOUT.num_ffn]
    shared = sum(error) / len(error)
    moved = [0.1 * (own + 6.0 * shared) for own in error] + [0.0] * LAYOUT.num_zero
    assert bias_of(rule).tolist() == pytest.approx(moved, abs=1e-15)
    assert abs(shared) > 1e-4


def test_sign_moves_by_its_closed_form() -> None:
    rule, counts = rule_of(Sign(rate=0.01)), [16, 17, 15, 0, 48, 16, 20, 12]
    rule.after_step(stats_of(counts, TOKENS), 0)
    assert bias_of(rule).tolist() == [0.0, -0.01, 0.01, 0.01, -0.01, 0.0, 0.0, 0.0]


@st.composite
def at_target(draw: st.DrawFn) -> tuple[Layout, int, list[int]]:
    """A layout, tokens and counts at which every FFN expert is exactly at its target."""
    num_ffn, each = draw(st.integers(1, 600)), draw(st.integers(1, 70_000))
    zero = draw(st.integers(0, 300))
    top_k = draw(st.integers(1, num_ffn))
    tokens = each * num_ffn
    spare = 0 if zero == 0 else draw(st.integers(0, min(top_k - 1, zero)))
    count = each * (top_k - spare)
    layout = Layout(num_ffn, zero, top_k, float(top_k - spare))
    rest = [tokens * spare // zero] * zero if zero else []
    return layout, tokens, [count] * num_ffn + rest


@given(at_target(), st.sampled_from([Budget(), Budget(integral=0.5, derivative=2.0), Sign()]))
@settings(max_examples=80, deadline=None)
def test_at_exact_target_load_nothing_moves(
    case: tuple[Layout, int, list[int]], config: BalanceConfig
) -> None:
    layout, tokens, counts = case
    rule = config.build(layout)
    rule.after_step(stats_of(counts, tokens), 0)
    assert not bias_of(rule).any()


def test_sign_is_exact_on_batches_of_many_millions() -> None:
    """One assignment too many or too few is seen where fp32 no longer counts by one."""
    layout = Layout(4, 2, 3, 2.5)
    tokens = 80_000_008
    rule = Sign(rate=1.0).build(layout)
    target = 50_000_005
    counts = [target - 1, target, target + 1, target, 0, 0]
    rule.after_step(stats_of(counts, tokens), 0)
    assert bias_of(rule).tolist() == [1.0, 0.0, -1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("config", [Budget(), Budget(integral=0.2, derivative=0.7), Sign()])
def test_zero_experts_never_move(config: BalanceConfig) -> None:
    rule = rule_of(config)
    for step in range(5):
        rule.after_step(stats_of(random_counts(step), TOKENS), step)
    assert (bias_of(rule)[:6] != 0).sum() >= 4
    assert bias_of(rule)[6:].tolist() == [0.0, 0.0]


def test_mu_decays_in_steps_to_its_floor() -> None:
    """Meituan's rule "1000 0.5 0.01" on 0.1."""
    config = Budget()
    wanted = {0: 0.1, 999: 0.1, 1000: 0.05, 2500: 0.025, 3999: 0.0125, 4000: 0.01, 10**6: 0.01}
    assert {step: config.mu_at(step) for step in wanted} == pytest.approx(wanted)
    assert Budget(mu=0.004).mu_at(0) == 0.004
    rule, counts = rule_of(config), random_counts(0)
    rule.after_step(stats_of(counts, TOKENS), 2500)
    assert bias_of(rule).tolist() == pytest.approx([0.025 * e for e in errors(counts)], abs=1e-15)


def test_gains_make_a_pid() -> None:
    """In position form, Z the summed error: bias = mu (Z + k_i sum Z + k_d (Z - last Z))."""
    mu, k_i, k_d = 0.05, 0.3, 0.8
    config = Budget(mu=mu, decay=1.0, integral=k_i, derivative=k_d)
    rule = rule_of(config)
    z, z_sum = [0.0] * 8, [0.0] * 8
    for step in range(12):
        counts = random_counts(step)
        rule.after_step(stats_of(counts, TOKENS), step)
        last, z = z, [old + e for old, e in zip(z, errors(counts), strict=True)]
        z_sum = [old + new for old, new in zip(z_sum, z, strict=True)]
        wanted = [
            mu * (now + k_i * total + k_d * (now - before))
            for now, total, before in zip(z, z_sum, last, strict=True)
        ]
        assert bias_of(rule).tolist() == pytest.approx(wanted, abs=1e-14)


def simulate(config: BalanceConfig, steps: int) -> tuple[list[RouteStats], BalanceRule]:
    """A fixed lopsided softmax router on fresh random tokens, its bias under the controller."""
    layout = Layout(16, 8, 6, 4.0)
    rule = config.build(layout)
    moe = MoE(16, 2, 6, zero_experts=8, ffn_per_token=4.0)
    router = build(moe, 12).router.float()
    with torch.no_grad():
        for weight in router.parameters():
            weight[:4] += 0.4
            weight[16:] *= 1.3
    seen: list[RouteStats] = []
    offset_D = torch.full((12,), 0.5)
    for step in range(steps):
        with torch.no_grad():
            x_ND = noise(1024, 12, seed=step).float() + offset_D
            route = router(x_ND, bias_of(rule))
        counts = torch.bincount(route.index_NS.flatten(), minlength=24)
        hist_S = torch.bincount((route.index_NS < 16).sum(-1), minlength=7)
        stats = stats_of(counts.tolist(), 1024)
        seen.append(dataclasses.replace(stats, hist_S=hist_S))
        rule.after_step(seen[-1], step)
    return seen, rule


@pytest.mark.parametrize(
    "config",
    [
        Budget(mu=0.5, every=100),
        Budget(mu=0.5, every=100, integral=0.002, derivative=0.5),
        Sign(rate=0.001),
    ],
)
def test_controllers_meet_the_budget_and_leave_tokens_free(config: BalanceConfig) -> None:
    """Mean FFN experts a token within 1 % of the budget, the spread over tokens well above zero."""
    seen, _ = simulate(config, 300)
    picks = torch.arange(7.0)

    def mean(stats: RouteStats) -> float:
        return float((stats.hist_S * picks).sum() / stats.hist_S.sum())

    assert abs(mean(seen[0]) - 4.0) > 0.2, "the router starts too close to the budget"
    late = seen[200:]
    assert sum(map(mean, late)) / len(late) == pytest.approx(4.0, rel=0.01)
    hist_S = torch.stack([stats.hist_S for stats in late]).sum(0).double()
    share_S = hist_S / hist_S.sum()
    spread = float(((share_S * picks**2).sum() - (share_S * picks).sum() ** 2).sqrt())
    assert spread > 0.5
    loads = torch.stack([stats.count_E[:16] for stats in late]).sum(0).double()
    assert float(loads.std() / loads.mean()) < 0.05
    assert float(seen[0].count_E[:16].double().std() / seen[0].count_E[:16].double().mean()) > 0.3


def test_an_adaptive_gain_settles_where_a_fixed_one_swings() -> None:
    """Scores that lie closer together than one move: all tokens change over, and back."""
    layout = Layout(num_ffn=16, num_zero=8, top_k=6, ffn_per_token=4.0)
    spread, late = {}, {}
    for adaptive in (False, True):
        config = Budget(mu=0.01, integral=0.02, mean_gain=400.0, adaptive=adaptive)
        rule = rule_of(config, layout)
        means: list[float] = []
        for step in range(300):
            score_NE = (0.02 * noise(1024, 24, seed=step)).softmax(-1)
            index_NS = (score_NE + bias_of(rule)).topk(6).indices
            counts = torch.bincount(index_NS.flatten(), minlength=24)
            means.append(float((index_NS < 16).sum()) / 1024)
            rule.after_step(stats_of(counts.tolist(), 1024), step)
        late[adaptive] = statistics.fmean(means[100:])
        spread[adaptive] = statistics.pstdev(means[100:])
    assert spread[False] > 1.0 and spread[True] < 0.3
    assert late[True] == pytest.approx(4.0, rel=0.01)


def test_an_adaptive_gain_follows_the_sign_of_the_shared_error() -> None:
    many, few = [TOKENS // 2] * 6 + [0] * 2, [0] * 6 + [TOKENS] * 2
    rule = rule_of(Budget(mean_gain=10.0, adaptive=True))
    gains: list[float] = []
    for counts in (many, few, many, many, *[many] * 9):
        rule.after_step(stats_of(counts, TOKENS), 0)
        gains.append(float(rule.state_dict()["gain"]))
    assert gains[:4] == pytest.approx([10.0, 7.0, 4.9, 6.86])
    assert gains[-1] == 10.0
    fixed = rule_of(Budget(mean_gain=10.0))
    assert "gain" not in fixed.state_dict()


@pytest.mark.parametrize("config", [Budget(mu=5.0), Sign(rate=0.1)])
def test_counts_are_summed_over_micro_batches_before_the_update(config: BalanceConfig) -> None:
    moe = build(MoE(6, 4, 3, zero_experts=2, ffn_per_token=2.0, balance=(config,)), 8)
    x_BTD, ctx = noise(8, 16, 8), context(8, 16)
    initial = [buffer.clone() for buffer in moe.buffers()]
    biases = []
    for size in (8, 4, 2, 1):
        for buffer, value in zip(moe.buffers(), initial, strict=True):
            buffer.copy_(value)
        pieces = [moe(x_BTD[i : i + size], part(ctx, i, i + size))[1] for i in range(0, 8, size)]
        assert not moe.bias_E().any(), "a forward moved the bias"
        total = functools.reduce(operator.add, pieces)
        assert total.num_tokens == 128
        moe.balance_rules()[0].after_step(total, 0)
        biases.append(moe.bias_E())
    assert biases[0].any()
    assert all(torch.equal(bias_E, biases[0]) for bias_E in biases)
