"""Collectives that are the identity on one process, and what a part says of its own distribution.

A group is a torch process group, or None for one process alone: a forward calls these functions and
never asks which it is. The objective is the SUM of what all ranks compute of it, so the gradient
that a rank has of something all of them hold is a share, and shares add up to the whole; sums over
ranks are their own transpose. Letters: M rows, D width, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Group = dist.ProcessGroup | None


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


def places(length: int, group: Group, device: torch.device | None = None) -> Tensor:
    """Which tokens of a sequence this rank has: one piece from its front and one from its back, so
    that causal attention costs each rank as much (Llama 3, 3.3.2)."""
    return torch.cat(_pieces(length, group, device)[rank_in(group)])


def _pieces(
    length: int, group: Group, device: torch.device | None = None
) -> list[tuple[Tensor, Tensor]]:
    ranks = size_of(group)
    pieces = torch.arange(length, device=device).chunk(2 * ranks)
    return [(pieces[rank], pieces[-1 - rank]) for rank in range(ranks)]


class _Sequences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTX: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x_BTX) for _ in range(group.size())]
        dist.all_gather(parts, x_BTX.contiguous(), group=group)
        together = torch.cat(parts, dim=1)
        place_S = _order(together.shape[1], group, x_BTX.device)
        return torch.empty_like(together).index_copy_(1, place_S, together)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_BSX, group = grad_outputs[0], ctx.group
        by_rank = grad_BSX[:, _order(grad_BSX.shape[1], group, grad_BSX.device)]
        parts = torch.stack(by_rank.chunk(group.size(), dim=1))
        grad_BTX = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(grad_BTX, parts, group=group)
        return grad_BTX, None


def _order(length: int, group: Group, device: torch.device) -> Tensor:
    """The places of all ranks' tokens, one rank after the other."""
    return torch.cat([torch.cat(pair) for pair in _pieces(length, group, device)])


def sequences(x_BTX: Tensor, group: Group) -> Tensor:
    """Whole sequences, in order, of what each rank has for its tokens of them (`places`)."""
    return x_BTX if group is None else _Sequences.apply(x_BTX, group)  # pyright: ignore


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.back = (receive, send, group)
        return _exchanged(x_MD, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return _exchanged(grad_outputs[0], *ctx.back), None, None, None


def _exchanged(
    x_MD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
) -> Tensor:
    out_MD = x_MD.new_empty(sum(receive), *x_MD.shape[1:])
    dist.all_to_all_single(out_MD, x_MD.contiguous(), receive, send, group=group)
    return out_MD


def exchange(
    x_MD: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """All-to-all of rows: the first send[0] go to rank 0; receive[0] of the result come from it.

    Its gradient goes back the same way.
    """
    return _Exchange.apply(x_MD, list(send), list(receive), group)  # pyright: ignore


def exchange_counts(count_R: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What each rank counted for this one, given what this one counted for each (int64)."""
    received_R = torch.empty_like(count_R)
    dist.all_to_all_single(received_R, count_R.contiguous(), group=group)
    return received_R
