"""Collectives that are the identity on one process, and what a part says of its own distribution.

A group is a torch process group, or None for one process alone: a forward calls these functions and
never asks which it is. The objective is the SUM of what all ranks compute of it, so the gradient
that a rank has of something all of them hold is a share, and shares add up to the whole; sums over
ranks are their own transpose. Letters: M rows, D width, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Group = dist.ProcessGroup | None
Exchange = Literal["all_to_all", "all_gather"]


@dataclass(frozen=True)
class Ranks:
    """The groups of a layout, by what their ranks share."""

    # The global batch: each has other tokens of it.
    data: Group = None
    # The same sequences: each has other tokens of them, and sees the keys and values of all.
    context: Group = None
    # The same tokens: each computes with its own heads, hidden units and words of the vocabulary.
    tensor: Group = None
    # The weights: each element lies on one of them.
    weights: Group = None
    # The experts: each is held by one of them.
    experts: Group = None
    # How tokens travel between those.
    exchange: Exchange = "all_to_all"


@dataclass(frozen=True)
class Cut:
    """Each rank of a group holds an equal part of a weight along `dim`, 0 or 1.

    Where several matrices of equal height lie one above the other (`blocks`; gate and up: 2), it
    holds a part of each. Over no group nothing is cut.
    """

    group: Group
    dim: int = 0
    blocks: int = 1


class Spread(ABC):
    """A part that computes with other ranks or holds only some of its weights."""

    @abstractmethod
    def spread(self, ranks: Ranks) -> Mapping[str, Cut]:
        """Take the groups over, before the first forward; how its own weights are to be cut.

        ValueError where the part cannot be spread over such groups.
        """


def size_of(group: Group) -> int:
    """How many ranks a group has."""
    return 1 if group is None else group.size()


def rank_in(group: Group) -> int:
    """Which of them this process is."""
    return 0 if group is None else group.rank()


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the ranks, the same bits on each; no gradient passes through."""
    if group is None:
        return x
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def first(x: Tensor, group: Group) -> Tensor:
    """What the first of the ranks has, on each of them; no gradient passes through."""
    if group is None:
        return x
    told = x.detach().clone()
    dist.broadcast(told, group=group, group_src=0)
    return told


def packed(tensors: Sequence[Tensor], collective: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What a collective gives for each of many small tensors, called once a dtype."""
    found: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        places = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        told = collective(torch.cat([tensors[i].detach().flatten() for i in places]))
        pieces = told.split([tensors[i].numel() for i in places])
        found |= {i: piece.view(tensors[i].shape) for i, piece in zip(places, pieces, strict=True)}
    return [found[i] for i in range(len(tensors))]


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return summed(grad_outputs[0].contiguous(), ctx.group), None


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return summed(grad_outputs[0].contiguous(), ctx.group), None


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, num: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.num = group, num
        most = _portion(num, group)
        own = F.pad(x_MD, (0, 0, 0, most - len(x_MD))).contiguous()
        rows = own.new_empty(most * group.size(), own.shape[1])
        dist.all_gather_into_tensor(rows, own, group=group)
        return rows[:num]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad, group = grad_outputs[0], ctx.group
        most, first = _portion(ctx.num, group), group.rank() * _portion(ctx.num, group)
        # Added up in fp32 at least.
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        wide = F.pad(wide, (0, 0, 0, most * group.size() - ctx.num)).contiguous()
        own = wide.new_empty(most, wide.shape[1])
        dist.reduce_scatter_tensor(own, wide, group=group)
        return own[: max(0, min(most, ctx.num - first))].to(grad.dtype), None, None


def _portion(num: int, group: dist.ProcessGroup) -> int:
    """How many of so many rows each rank has, the last ones fewer or none."""
    return -(-num // group.size())


def own_rows(x: Tensor, group: Group) -> Tensor:
    """This rank's portion of rows that all ranks have."""
    if group is None:
        return x
    most = _portion(len(x), group)
    return x[group.rank() * most : (group.rank() + 1) * most]


def all_rows(x_MD: Tensor, num: int, group: Group) -> Tensor:
    """All `num` rows, on each rank, of which each has its portion; in the backward the shares are
    added up.
    """
    return x_MD if group is None else _Together.apply(x_MD, num, group)  # pyright: ignore


def added(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the ranks, on each of them; in the backward the shares are added up."""
    return x if group is None else _Added.apply(x, group)  # pyright: ignore


def copied(x: Tensor, group: Group) -> Tensor:
    """x itself, already the same on every rank; in the backward the shares are added up."""
    return x if group is None else _Copied.apply(x, group)  # pyright: ignore


@overload
def share(x: Tensor, group: Group) -> Tensor: ...
@overload
def share(x: None, group: Group) -> None: ...
def share(x: Tensor | None, group: Group) -> Tensor | None:
    """This rank's part of what is to be added once, by ranks of which each adds something."""
    return x if x is None or group is None else x / group.size()


def looked_up(index: Tensor, w_VD: Tensor, group: Group) -> Tensor:
    """Rows of a table of which each rank holds an equal part, in order."""
    if group is None:
        return F.embedding(index, w_VD)
    own = index - group.rank() * len(w_VD)
    here = (own >= 0) & (own < len(w_VD))
    rows = F.embedding(torch.where(here, own, 0), w_VD)
    return added(rows * here[..., None], group)
