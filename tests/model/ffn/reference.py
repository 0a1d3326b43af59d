"""What the tests of the feed-forward seam compare with: a MoE written as plain loops, in fp64.

Letters: B sequences of T tokens, N = B x T, D width, E router outputs, S selected.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from moebius.model.context import Context
from moebius.model.ffn import RouteStats
from moebius.model.ffn.moe import MoE, MoELayer
from moebius.model.ffn.routers import Route
from moebius.model.ffn.routers.sigmoid import Sigmoid
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.part import Site
from moebius.model.weight import initialise


def build(config: MoE, width: int, seed: int = 0, layer: int = 0) -> MoELayer:
    """The layer in fp64, initialised."""
    module = config.build(Site(width, 2, layer, 1e-5))
    assert isinstance(module, MoELayer)
    initialise(module, seed)
    return module.double()


def context(
    batch: int,
    length: int,
    *,
    valid_BT: Tensor | None = None,
    num_targets: int | None = None,
    first: int = 0,
    step: int = 0,
) -> Context:
    """One document a sequence; all tokens valid unless told otherwise."""
    position_BT = torch.arange(length).expand(batch, length)
    valid_BT = torch.ones(batch, length, dtype=torch.bool) if valid_BT is None else valid_BT
    count = int(valid_BT.sum()) if num_targets is None else num_targets
    zeros_BT = torch.zeros_like(position_BT)
    numbers_B = torch.arange(first, first + batch)
    return Context.packed(position_BT, zeros_BT, valid_BT, numbers_B, count, step)


def part(ctx: Context, start: int, stop: int) -> Context:
    """Sequences start to stop of a context: a micro-batch of it."""
    names = ("position_BT", "document_BT", "valid_BT", "attend_BTT", "sequence_B")
    return dataclasses.replace(ctx, **{name: getattr(ctx, name)[start:stop] for name in names})


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in fp64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(moe: MoELayer) -> dict[str, Tensor]:
    """Leaves in fp64 that are copies of the layer's weights."""
    return {name: w.detach().clone().requires_grad_() for name, w in moe.named_parameters()}


def scores_by_loops(config: MoE, logits: Sequence[Tensor]) -> list[Tensor]:
    """The scores of one token."""
    if isinstance(config.router, Sigmoid):
        return [1.0 / (1.0 + (-logit).exp()) for logit in logits]
    total = sum((logit.exp() for logit in logits), torch.zeros((), dtype=torch.float64))
    return [logit.exp() / total for logit in logits]


def swiglu_by_loops(x_D: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """`w_down (silu(gate) * up)` for one token, gate rows first."""
    hidden = w_gate_up.shape[0] // 2
    out_D = torch.zeros_like(x_D)
    for f in range(hidden):
        gate, up = (w_gate_up[f] * x_D).sum(), (w_gate_up[hidden + f] * x_D).sum()
        out_D = out_D + w_down[:, f] * (gate / (1.0 + (-gate).exp()) * up)
    return out_D


def moe_by_loops(
    config: MoE,
    weights: dict[str, Tensor],
    x_ND: Tensor,
    bias_E: Tensor,
    shift_E: Tensor | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """The output y_ND and each token's experts; `shift_E` is added to the scores of every token."""
    rows, chosen_all = [], []
    outputs = config.experts + config.zero_experts
    for x_D in x_ND:
        scores = scores_by_loops(
            config, [(weights["router.w_ED"][e] * x_D).sum() for e in range(outputs)]
        )
        biased = [float(scores[e].detach()) + float(bias_E[e]) for e in range(outputs)]
        chosen = sorted(range(outputs), key=biased.__getitem__, reverse=True)[: config.top_k]
        if shift_E is not None:
            scores = [score + shift_E[e] for e, score in enumerate(scores)]
        gates = [scores[e] for e in chosen]
        if isinstance(config.router, Softmax | Sigmoid) and config.router.renormalise:
            total = sum(gates, torch.zeros((), dtype=torch.float64))
            gates = [gate / total for gate in gates]
        y_D = torch.zeros_like(x_D)
        for e, gate in zip(chosen, gates, strict=True):
            if e < config.experts:
                w_gate_up, w_down = weights["w_gate_up_E2FD"][e], weights["w_down_EDF"][e]
                y_D = y_D + gate * swiglu_by_loops(x_D, w_gate_up, w_down)
            else:
                y_D = y_D + gate * x_D
        y_D = config.scaling * config.split * y_D
        if config.shared_experts:
            y_D = y_D + swiglu_by_loops(x_D, weights["shared_gate_up"], weights["shared_down"])
        rows.append(y_D)
        chosen_all.append(chosen)
    return torch.stack(rows), chosen_all


def random_route(
    num_tokens: int, num_outputs: int, top_k: int, seed: int, kind: str = "softmax"
) -> Route:
    """A routing of random logits."""
    logit_NE = noise(num_tokens, num_outputs, seed=seed)
    return route_of(logit_NE, top_k, kind)


def route_of(logit_NE: Tensor, top_k: int, kind: str = "softmax") -> Route:
    """The routing of logits without a bias."""
    score_NE = logit_NE.softmax(-1) if kind == "softmax" else logit_NE.sigmoid()
    index_NS = score_NE.topk(top_k, dim=-1).indices
    return Route(logit_NE, score_NE, index_NS, score_NE.gather(-1, index_NS))


def stats_of(counts: Sequence[int], num_tokens: int) -> RouteStats:
    """Stats with given assignments; what controllers do not read is zero."""
    zero = torch.zeros((), dtype=torch.int64)
    count_E = torch.tensor(counts)
    scores_E = torch.zeros(len(counts))
    return RouteStats(count_E, scores_E, zero[None], torch.tensor(num_tokens), zero, zero)


def route_stats(route: Route, ctx: Context) -> RouteStats:
    """The counts of a routing, by loops over valid tokens."""
    counts = [0] * route.score_NE.shape[1]
    valid = ctx.valid_BT.flatten().tolist()
    for chosen, keep in zip(route.index_NS.tolist(), valid, strict=True):
        for e in chosen if keep else ():
            counts[e] += 1
    stats = stats_of(counts, sum(valid))
    scores_E = torch.stack(
        [row for row, keep in zip(route.score_NE.detach(), valid, strict=True) if keep]
    ).sum(0)
    return dataclasses.replace(stats, score_sum_E=scores_E)


def relative(left: Tensor, right: Tensor) -> float:
    """Norm of the difference over the norm of the second, which must not be 0."""
    return float((left.detach() - right.detach()).norm()) / float(right.detach().norm())
