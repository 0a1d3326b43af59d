"""Checks of what is not a plain map of x_BTD: feed-forwards in two calls, routers, rules and ends.

All in fp64, with padding at the end of the sequences.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moebius.model.context import Context
from moebius.model.ends.head import Embedding, Head
from moebius.model.ffn import RouteStats
from moebius.model.ffn.balance import BalanceRule
from moebius.model.ffn.routers import Route
from moebius.model.weight import initialise, named_weights

from .cases import LAYOUT, SITE, VOCAB, WIDTH
from .common import attributes, close, context, fresh, hidden, noise, same_attributes

PADDED = 3
OUTPUTS, TOP_K = LAYOUT.num_outputs, LAYOUT.top_k


def padded_context() -> Context:
    """Two sequences of 16 tokens, the last few padding."""
    return context((16,), (6, 10), padded=PADDED)


# --- feed-forwards --------------------------------------------------------------------------------


def check_two_calls(config: Any) -> None:
    """`forward` is `begin` then `finish`; stats count the valid tokens and carry no gradient."""
    ffn, h_BTD, ctx = fresh(config), hidden(2, 16), padded_context()
    y_BTD, stats = ffn(h_BTD, ctx)
    again_BTD, again = ffn.finish(ffn.compute(ffn.begin(h_BTD, ctx)))
    assert torch.equal(y_BTD, again_BTD), "begin and finish give another output than forward"
    assert (stats is None) == (again is None)
    if stats is None:
        return
    selected = int(stats.hist_S.sum())
    assert int(stats.num_tokens) == int(ctx.valid_BT.sum()) == selected, "stats count padding"
    for field in dataclasses.fields(stats):
        assert not getattr(stats, field.name).requires_grad, f"stats.{field.name} holds the graph"


def check_uses(config: Any) -> None:
    """`uses_per_token` names weights and gives shares in order."""
    ffn = fresh(config)
    for name, share in ffn.uses_per_token().items():
        ffn.get_parameter(name)
        assert 0 <= share[0] <= share[1] <= share[2] <= 1, f"{name}: shares {share}"


# --- routers --------------------------------------------------------------------------------------


def check_route(config: Any) -> None:
    """Distinct outputs are selected; scores and weights are of at least fp32, in any precision."""
    router, zero_E = fresh(config), torch.zeros(OUTPUTS)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        route: Route = router(noise(50, WIDTH, dtype=dtype), zero_E)
        wide = torch.promote_types(dtype, torch.float32)
        assert route.score_NE.dtype == route.weight_NS.dtype == wide
        assert route.score_NE.shape == (50, OUTPUTS) and route.index_NS.shape == (50, TOP_K)
        assert ((route.index_NS >= 0) & (route.index_NS < OUTPUTS)).all()
        ordered_NS = route.index_NS.sort(-1).values
        assert (ordered_NS[:, 1:] > ordered_NS[:, :-1]).all(), "an output is selected twice"


def check_bias(config: Any) -> None:
    """A bias moves the selection; weights stay those of the scores; it gets no gradient."""
    router, x_ND = fresh(config), noise(50, WIDTH, dtype=torch.float64)
    bias_E = torch.zeros(OUTPUTS, requires_grad=True)
    with torch.no_grad():
        bias_E[OUTPUTS - 1] = 100.0
    route: Route = router(x_ND, bias_E)
    assert (route.index_NS == OUTPUTS - 1).any(-1).all(), "a large bias does not select"
    score_NS = route.score_NE.gather(-1, route.index_NS)
    ratio_NS = route.weight_NS / score_NS
    close(ratio_NS, ratio_NS[:, :1].expand_as(ratio_NS), "weights are not those of the scores")
    route.weight_NS.square().sum().backward()
    assert bias_E.grad is None or not bias_E.grad.any(), "the bias gets a gradient"
    for name, weight in named_weights(router):
        assert weight.grad is not None and weight.grad.any(), f"no gradient reaches {name}"


# --- balance rules --------------------------------------------------------------------------------


def route_of(logit_NE: Tensor) -> Route:
    """A softmax routing of given logits."""
    score_NE = logit_NE.softmax(-1)
    weight_NS, index_NS = score_NE.topk(TOP_K, dim=-1)
    return Route(logit_NE, score_NE, index_NS, weight_NS)


def stats_of(seed: int) -> RouteStats:
    """What a router did to 100 tokens, made up."""
    index_NS = torch.rand(100, OUTPUTS, generator=torch.Generator().manual_seed(seed)).topk(TOP_K)[
        1
    ]
    ffn_N = (index_NS < LAYOUT.num_ffn).sum(-1)
    none = torch.zeros((), dtype=torch.int64)
    return RouteStats(
        count_E=index_NS.flatten().bincount(minlength=OUTPUTS),
        score_sum_E=noise(OUTPUTS, seed=seed).abs(),
        hist_S=ffn_N.bincount(minlength=TOP_K + 1),
        num_tokens=torch.tensor(100),
        num_dropped=none,
        num_recycled=none,
    )


def check_loss(config: Any) -> None:
    """A rule's loss is a scalar divided by the global count; padding has no part in it."""
    rule: BalanceRule = fresh(config)
    # Uneven loads to look back on: at even ones a load loss is constant.
    rule.after_step(stats_of(0), 0)
    before = attributes(rule)
    logit_NE = noise(32, OUTPUTS, dtype=torch.float64).requires_grad_()
    ctx = padded_context()
    loss = rule.loss(route_of(logit_NE), ctx)
    same_attributes(before, rule, "loss")
    if loss is None:
        return
    assert loss.shape == () and loss.isfinite() and loss.dtype == torch.float64
    loss.backward()
    assert logit_NE.grad is not None
    grad_BTE = logit_NE.grad.unflatten(0, (2, 16))
    assert not grad_BTE[:, 16 - PADDED :].any(), "padding gets a gradient"
    assert grad_BTE[:, : 16 - PADDED].any(), "no gradient reaches the router"
    twice = rule.loss(route_of(logit_NE), dataclasses.replace(ctx, num_targets=2 * ctx.num_targets))
    assert twice is not None
    close(2 * twice, loss, "the loss is not divided by the global count of targets")


def check_after_step(config: Any) -> None:
    """What a rule remembers is all in its state: restored, it goes on to the same bits."""
    rule: BalanceRule = fresh(config)
    for step in range(2):
        rule.after_step(stats_of(step), step)
    twin: BalanceRule = fresh(config)
    twin.load_state_dict(rule.state_dict())
    for each in (rule, twin):
        each.after_step(stats_of(2), 2)
    for (name, tensor), other in zip(rule.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(tensor, other), f"{name} differs in a rule restored from its state"
        assert tensor.isfinite().all()
    bias_E = rule.bias_E()
    if bias_E is not None:
        assert bias_E.shape == (OUTPUTS,) and not bias_E.requires_grad
        assert bias_E.any(), "after three unbalanced steps the bias has not moved"
        assert not bias_E[LAYOUT.num_ffn :].any(), "zero experts have a bias"


# --- ends -----------------------------------------------------------------------------------------


def end_gradients(config: Any, hidden_BTD: Tensor, targets_BT: Tensor, ctx: Context) -> Any:
    """The end after a backward of its loss alone, and the gradient of the hidden states."""
    end = fresh(config)
    embed, head = Embedding(VOCAB, WIDTH, tied=False), Head(VOCAB, WIDTH, SITE.eps, None)
    initialise(embed, 1)
    initialise(head, 2)
    hidden_BTD = hidden_BTD.clone().requires_grad_()
    before = attributes(end)
    out_BTD, sums = end(hidden_BTD, targets_BT, ctx, embed, head)
    same_attributes(before, end, "forward")
    assert torch.equal(out_BTD, hidden_BTD), "an end must pass the hidden states on unchanged"
    assert sums and all(not value.requires_grad for value in sums.values())
    (0.0 * out_BTD).sum().backward()
    return end, hidden_BTD.grad


def targets(ctx: Context, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, tuple(ctx.valid_BT.shape), generator=generator)


def check_end(config: Any) -> None:
    """An end passes hidden states on; its loss reaches them and all its weights, not padding."""
    ctx = padded_context()
    end, grad_BTD = end_gradients(config, hidden(2, 16), targets(ctx), ctx)
    assert grad_BTD.isfinite().all() and grad_BTD.any(), "the loss does not reach the hidden states"
    assert not grad_BTD[:, 16 - PADDED :].any(), "padding gets a gradient"
    for name, weight in named_weights(end):
        assert weight.grad is not None and weight.grad.any(), f"no gradient reaches {name}"


def check_end_packed(config: Any) -> None:
    """The loss of one document does not depend on the next."""
    ctx, x_BTD = context((7, 9)), hidden(1, 16)
    targets_BT = targets(ctx)
    _, grad_BTD = end_gradients(config, x_BTD, targets_BT, ctx)
    x_BTD[:, 7:], targets_BT[:, 7:] = -x_BTD[:, 7:], VOCAB - 1 - targets_BT[:, 7:]
    _, other_BTD = end_gradients(config, x_BTD, targets_BT, ctx)
    close(other_BTD[:, :7], grad_BTD[:, :7], "another second document moved the first's gradient")
    assert not torch.equal(other_BTD[:, 7:], grad_BTD[:, 7:])


FFN_CHECKS = (check_two_calls, check_uses)
ROUTER_CHECKS = (check_route, check_bias)
BALANCE_CHECKS = (check_loss, check_after_step)
END_CHECKS = (check_end, check_end_packed)
