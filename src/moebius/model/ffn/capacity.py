"""Expert capacity with dropping or Hunyuan-Large's recycle routing (2411.02265, 2.2); training
only.

An FFN expert takes ceil(factor * tokens * FFN experts per token / experts) assignments of its
scope, the first in token order. What overflows is dropped, or recycled: sent to a uniformly random
free slot, weighted by the token's own score of the expert it lands on. Scope `sequence` is seeded
by step, layer and the sequence's global index, so it does not change with the micro-batch split;
`micro_batch` by the first of them. Letters: M tokens of one scope, S selected, E router outputs.
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from moebius.model.context import Context
from moebius.model.ffn.balance import Layout
from moebius.model.ffn.routers import Route
from moebius.monitor.tap import tap_gradient
from moebius.ops.ranks import Group
from moebius.ops.sequences import own_places, sequences


@dataclasses.dataclass(frozen=True)
class Capacity:
    """`factor` times the mean load is what an expert takes."""

    factor: float = 1.25
    overflow: Literal["drop", "recycle"] = "drop"
    scope: Literal["sequence", "micro_batch"] = "sequence"

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"factor ({self.factor}) must be above 0; 1 gives room for mean load")

    def limit(self, num_tokens: int, layout: Layout) -> int:
        """Assignments that one FFN expert takes from `num_tokens` tokens."""
        mean = num_tokens * layout.ffn_per_token / layout.num_ffn
        # Rounded first: 1.1 * 70 is a little above 77 in floating point.
        return math.ceil(round(self.factor * mean, 6))


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A routing that fits: dropped assignments have index E (past all outputs) and weight 0."""

    index_NS: Tensor
    weight_NS: Tensor
    num_dropped: Tensor
    num_recycled: Tensor


def fit(
    capacity: Capacity,
    layout: Layout,
    route: Route,
    ctx: Context,
    layer: int,
    sharers: Group = None,
) -> Fitted:
    """Apply a capacity to a routing, scope by scope.

    Where ranks share sequences, each fits all of their tokens and takes its own.
    """
    index_BTS = sequences(route.index_NS.unflatten(0, ctx.valid_BT.shape), sharers)
    valid_BT = sequences(ctx.valid_BT, sharers)
    size = valid_BT.shape[1] if capacity.scope == "sequence" else valid_BT.numel()
    index_XMS = index_BTS.flatten(0, 1).unflatten(0, (-1, size)).clone()
    step = int(ctx.step)
    for i, (index_MS, valid_M) in enumerate(
        zip(index_XMS, valid_BT.flatten().unflatten(0, (-1, size)), strict=True)
    ):
        seed = (step * 1_000_003 + layer) * 1_000_003 + int(ctx.sequence_B[i])
        _fit_scope(capacity, layout, index_MS, valid_M, seed)
    index_BTS = index_XMS.view(index_BTS.shape)
    index_NS = own_places(index_BTS, ctx.place_T, sharers).flatten(0, 1)
    kept_NS = index_NS < layout.num_outputs
    landed_NS = index_NS.clamp(max=layout.num_outputs - 1)
    weight_NS = tap_gradient("score", route.score_NE.gather(-1, landed_NS), landed_NS) * kept_NS
    # An assignment that stayed keeps the weight its router gave it (renormalised or not).
    weight_NS = torch.where(index_NS == route.index_NS, route.weight_NS, weight_NS)
    # An overflow never lands on the expert that it left, which is full.
    moved_NS = (index_NS != route.index_NS) & kept_NS
    return Fitted(index_NS, weight_NS, (~kept_NS).sum(), moved_NS.sum())


def _fit_scope(
    capacity: Capacity, layout: Layout, index_MS: Tensor, valid_M: Tensor, seed: int
) -> None:
    """Edit one scope's indices in place."""
    limit = capacity.limit(int(valid_M.sum()), layout)
    flat = index_MS.view(-1)
    wanted = torch.where(valid_M[:, None], index_MS, layout.num_outputs).reshape(-1)
    one_hot = torch.nn.functional.one_hot(wanted, layout.num_outputs + 1)[:, : layout.num_ffn]
    position = (one_hot.cumsum(0) * one_hot).sum(-1)  # 1-based among its expert's; 0: not an FFN
    over = (position > limit).nonzero()[:, 0]
    flat[over] = layout.num_outputs
    if capacity.overflow == "drop" or len(over) == 0:
        return
    free_E = (limit - one_hot.sum(0)).clamp(min=0)
    slots = torch.arange(layout.num_ffn, device=flat.device).repeat_interleave(free_E)
    generator = torch.Generator().manual_seed(seed % 2**63)
    order = torch.randperm(len(slots), generator=generator).to(flat.device)
    slots = slots[order][: len(over)]
    moved = over[: len(slots)]
    # A token never holds one expert twice: such a landing is dropped instead.
    token = moved // index_MS.shape[1]
    held = (index_MS[token] == slots[:, None]).any(-1) | _seen_before(token * len(free_E) + slots)
    flat[moved[~held]] = slots[~held]


def _seen_before(key: Tensor) -> Tensor:
    """True where an equal entry stands earlier in a vector."""
    order = key.argsort(stable=True)
    seen = torch.zeros_like(key, dtype=torch.bool)
    seen[order[1:]] = key[order[1:]] == key[order[:-1]]
    return seen
