"""Tensors that travel between the ranks of a group while other work runs.

`depart` starts one collective for several tensors and returns at once; `land` waits for it. In the
backward it is the other way round: where they landed the gradients start, and where they departed
these are waited for, so what ran beside a transfer has its own backward beside the transfer's.
Autograd takes what was made last first, hence no order has to be forced. Letters: M rows, R ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor


class Collective(ABC):
    """How rows travel."""

    @property
    @abstractmethod
    def back(self) -> "Collective":
        """How their gradients do."""

    def packed(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor [M, any] of all their columns: their bytes, where several are only moved."""
        if len(tensors) == 1:
            return tensors[0].contiguous()
        return torch.cat([x.contiguous().view(torch.uint8) for x in tensors], dim=1)

    @abstractmethod
    def start(self, packed_M: Tensor) -> tuple[Tensor, Any]:
        """Start it; what will hold the result, and the work to wait for."""

    def unpacked(self, packed_M: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The columns of each, in its dtype."""
        if len(like) == 1:
            return (packed_M,)
        columns = packed_M.split([x.shape[1] * x.element_size() for x in like], dim=1)
        return tuple(c.contiguous().view(x.dtype) for c, x in zip(columns, like, strict=True))


@final
@dataclass(frozen=True)
class AllToAll(Collective):
    """The first send[0] rows go to rank 0 and so on; receive[0] of the result come from it."""

    send: tuple[int, ...]
    receive: tuple[int, ...]
    group: dist.ProcessGroup

    @property
    def back(self) -> Collective:
        return AllToAll(self.receive, self.send, self.group)

    def start(self, packed_M: Tensor) -> tuple[Tensor, Any]:
        out_M = packed_M.new_empty(sum(self.receive), packed_M.shape[1])
        split = (list(self.receive), list(self.send))
        work = dist.all_to_all_single(out_M, packed_M, *split, group=self.group, async_op=True)
        return out_M, work


@final
@dataclass(frozen=True)
class AllGather(Collective):
    """The rows of all ranks, in their order; each has as many."""

    group: dist.ProcessGroup

    @property
    def back(self) -> Collective:
        return ReduceScatter(self.group)

    def start(self, packed_M: Tensor) -> tuple[Tensor, Any]:
        size = self.group.size()
        out_RM = packed_M.new_empty(size, *packed_M.shape)
        pieces = list(out_RM.unbind())
        work = dist.all_gather(pieces, packed_M, group=self.group, async_op=True)
        return out_RM.flatten(0, 1), work


@final
@dataclass(frozen=True)
class ReduceScatter(Collective):
    """Of the sum over ranks, in at least fp32, the own one of equal parts."""

    group: dist.ProcessGroup

    @property
    def back(self) -> Collective:
        return AllGather(self.group)

    def packed(self, tensors: Sequence[Tensor]) -> Tensor:
        wide = torch.float32
        for x in tensors:
            wide = torch.promote_types(wide, x.dtype)
        return torch.cat([x.to(wide) for x in tensors], dim=1)

    def start(self, packed_M: Tensor) -> tuple[Tensor, Any]:
        pieces = list(packed_M.view(self.group.size(), -1, packed_M.shape[1]).unbind())
        out_M = torch.empty_like(pieces[0])
        return out_M, dist.reduce_scatter(out_M, pieces, group=self.group, async_op=True)

    def unpacked(self, packed_M: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        columns = packed_M.split([x.shape[1] for x in like], dim=1)
        return tuple(c.to(x.dtype) for c, x in zip(columns, like, strict=True))


class Flight(ABC):
    """Tensors that may still be under way."""

    @abstractmethod
    def land(self) -> tuple[Tensor, ...]:
        """Wait for them; once only."""


@final
@dataclass(frozen=True)
class Landed(Flight):
    """Tensors that never left."""

    tensors: tuple[Tensor, ...]

    def land(self) -> tuple[Tensor, ...]:
        return self.tensors


def depart(tensors: Sequence[Tensor], collective: Collective) -> Flight:
    """Start a collective for tensors [M, any] of one height, the first of which is of floats.

    Gradients come back the other way.
    """
    trip = _Trip()
    ticket = _Depart.apply(trip, collective, *tensors)  # pyright: ignore
    return _UnderWay(trip, collective, ticket)


@final
@dataclass(frozen=True)
class _UnderWay(Flight):
    trip: "_Trip"
    collective: Collective
    # Without elements: it ties landing to departure in the graph, where nothing has arrived yet.
    ticket: Tensor

    def land(self) -> tuple[Tensor, ...]:
        return _Land.apply(self.trip, self.collective, self.ticket)  # pyright: ignore


@final
class _Trip:
    """What is under way: there in the forward, back in the backward."""

    def __init__(self) -> None:
        self._under_way: tuple[Collective, list[Tensor], Tensor, Tensor, Any] | None = None

    def start(self, collective: Collective, tensors: Sequence[Tensor]) -> None:
        like = [x.new_empty(0, x.shape[1]) for x in tensors]
        sent_M = collective.packed(tensors)
        # What is sent is held until it has arrived.
        self._under_way = (collective, like, sent_M, *collective.start(sent_M))

    def wait(self) -> tuple[Tensor, ...]:
        assert self._under_way is not None, "nothing is under way; it lands once"
        collective, like, _, out_M, work = self._under_way
        self._under_way = None
        work.wait()
        return collective.unpacked(out_M, like)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: _Trip, collective: Collective, *tensors: Tensor) -> Tensor:
        ctx.trip, ctx.floats = trip, [x.is_floating_point() for x in tensors]
        trip.start(collective, tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grads = iter(ctx.trip.wait())
        return None, None, *(next(grads) if floats else None for floats in ctx.floats)


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: _Trip, collective: Collective, ticket: Tensor) -> Any:
        ctx.trip, ctx.collective, ctx.ticket = trip, collective, ticket.dtype
        arrived = trip.wait()
        ctx.floats = [x.is_floating_point() for x in arrived]
        ctx.mark_non_differentiable(*(x for x in arrived if not x.is_floating_point()))
        return arrived

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grads = [g for g, floats in zip(grad_outputs, ctx.floats, strict=True) if floats]
        ctx.trip.start(ctx.collective.back, grads)
        return None, None, grads[0].new_empty(0, dtype=ctx.ticket)


def exchange_counts(count_R: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What each rank counted for this one, given what this one counted for each (int64)."""
    received_R = torch.empty_like(count_R)
    dist.all_to_all_single(received_R, count_R.contiguous(), group=group)
    return received_R


def most(count: int, device: torch.device, group: dist.ProcessGroup) -> int:
    """The largest count of any rank."""
    largest = torch.tensor(count, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return int(largest)
