"""Collectives that are the identity on one process, and what a part says of its own distribution.

A group is a torch process group, or None for one process alone: a forward calls these functions and
never asks which it is. Letters: M rows, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Ranks:
    """The groups of a layout, by what their ranks share."""

    # The global batch: each has other tokens of it.
    data: Group = None
    # The weights: each element lies on one of them.
    weights: Group = None
    # The experts: each is held by one of them.
    experts: Group = None


class Spread(ABC):
    """A part that computes with other ranks or holds only some of its weights."""

    @abstractmethod
    def spread(self, ranks: Ranks) -> Mapping[str, Group]:
        """Take the groups over, before the first forward; the own weights whose first dim is to be
        cut into equal parts over the ranks of a group. ValueError where the part cannot.
        """


def size_of(group: Group) -> int:
    """How many ranks a group has."""
    return 1 if group is None else group.size()


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the ranks, the same bits on each; no gradient passes through."""
    if group is None:
        return x
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total


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
