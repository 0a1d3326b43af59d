"""Expert parallelism: tokens travel to the ranks that hold their experts, and results back.

`all_to_all`: a token goes once to each rank that holds any of its experts, with its weights;
assignments to zero-computation experts and dropped ones never travel (LongCat-Flash 2.1;
DeepSeek-V3 3.2.2). `all_gather`: every rank gets all tokens, and results are summed on the way
back. Equal shares of the experts lie on the ranks of a group in order; on one process nothing
moves. Letters: N tokens here, M rows received, S selected, D width, R ranks.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from moebius.ops.exchange import (
    AllGather,
    AllToAll,
    Flight,
    Landed,
    ReduceScatter,
    depart,
    exchange_counts,
    most,
)
from moebius.ops.ranks import Exchange, Group


@final
@dataclass(frozen=True)
class Rows:
    """What this rank's experts are to compute; indices of other ranks' experts are past its own."""

    x_MD: Tensor
    index_MS: Tensor
    weight_MS: Tensor


class _Way(ABC):
    """How results come back to the ranks of their tokens."""

    @abstractmethod
    def send(self, y_MD: Tensor) -> Flight:
        """Start it."""

    @abstractmethod
    def joined(self, y_MD: Tensor) -> Tensor:
        """The sum for each token, y_ND, of what has come back."""


@final
@dataclass(frozen=True)
class Dispatched:
    """Tokens under way to their experts; then their results under way back."""

    flight: Flight
    way: _Way
    computed: bool = False

    def arrived(self) -> Rows:
        """What has come here, waited for."""
        return Rows(*self.flight.land())

    def returning(self, y_MD: Tensor) -> "Dispatched":
        """Start the way back of what the experts made of the rows."""
        return Dispatched(self.way.send(y_MD), self.way, computed=True)


def dispatch(
    x_ND: Tensor,
    index_NS: Tensor,
    weight_NS: Tensor,
    num_experts: int,
    group: Group,
    exchange: Exchange = "all_to_all",
) -> Dispatched:
    """Start sending tokens to the ranks of their experts; indices from `num_experts` on stay."""
    if group is None:
        return Dispatched(Landed((x_ND, index_NS, weight_NS)), _Stay())
    here = num_experts // group.size()
    if exchange == "all_gather":
        return _to_all(x_ND, index_NS, weight_NS, here, group)
    return _to_owners(x_ND, index_NS, weight_NS, here, group)


def combine(sent: Dispatched) -> Tensor:
    """The sum of what each rank's experts made of a token, y_ND, waited for."""
    return sent.way.joined(*sent.flight.land())


@final
@dataclass(frozen=True)
class _Stay(_Way):
    def send(self, y_MD: Tensor) -> Flight:
        return Landed((y_MD,))

    def joined(self, y_MD: Tensor) -> Tensor:
        return y_MD


@final
@dataclass(frozen=True)
class _FromOwners(_Way):
    """`token_M` are the rows that were sent, `trip` how they came."""

    token_M: Tensor
    num_tokens: int
    trip: AllToAll

    def send(self, y_MD: Tensor) -> Flight:
        return depart((y_MD,), self.trip.back)

    def joined(self, y_MD: Tensor) -> Tensor:
        wide_MD = y_MD.to(torch.promote_types(y_MD.dtype, torch.float32))
        y_ND = wide_MD.new_zeros(self.num_tokens, y_MD.shape[1])
        sizes = list(self.trip.send)
        # One rank at a time, which has a token once: the order of the sum is the same everywhere.
        for token_m, rows_mD in zip(self.token_M.split(sizes), wide_MD.split(sizes), strict=True):
            y_ND.index_add_(0, token_m, rows_mD)
        return y_ND.to(y_MD.dtype)


def _to_owners(
    x_ND: Tensor, index_NS: Tensor, weight_NS: Tensor, here: int, group: dist.ProcessGroup
) -> Dispatched:
    rank_R11 = torch.arange(group.size(), device=index_NS.device)[:, None, None]
    goes_RN = (index_NS.div(here, rounding_mode="floor") == rank_R11).any(-1)
    rank_M, token_M = goes_RN.nonzero(as_tuple=True)
    count_R = goes_RN.sum(1)
    received_R = exchange_counts(count_R, group)
    trip = AllToAll(tuple(count_R.tolist()), tuple(received_R.tolist()), group)
    index_MS = _own(index_NS[token_M] - (here * rank_M)[:, None], here)
    flight = depart((x_ND[token_M], index_MS, weight_NS[token_M]), trip)
    return Dispatched(flight, _FromOwners(token_M, len(x_ND), trip))


@final
@dataclass(frozen=True)
class _FromAll(_Way):
    num_tokens: int
    group: dist.ProcessGroup

    def send(self, y_MD: Tensor) -> Flight:
        return depart((y_MD,), ReduceScatter(self.group))

    def joined(self, y_MD: Tensor) -> Tensor:
        return y_MD[: self.num_tokens]


def _to_all(
    x_ND: Tensor, index_NS: Tensor, weight_NS: Tensor, here: int, group: dist.ProcessGroup
) -> Dispatched:
    more = most(len(x_ND), x_ND.device, group) - len(x_ND)
    padded_NS = pad(index_NS, (0, 0, 0, more), value=here * group.size())
    flight = depart(
        (pad(x_ND, (0, 0, 0, more)), padded_NS, pad(weight_NS, (0, 0, 0, more))), AllGather(group)
    )
    return Dispatched(_Own(flight, here, group.rank()), _FromAll(len(x_ND), group))


@final
@dataclass(frozen=True)
class _Own(Flight):
    """The rows of all ranks, with indices as this one counts its experts."""

    flight: Flight
    here: int
    rank: int

    def land(self) -> tuple[Tensor, ...]:
        x_MD, index_MS, weight_MS = self.flight.land()
        return x_MD, _own(index_MS - self.here * self.rank, self.here), weight_MS


def _own(index_MS: Tensor, here: int) -> Tensor:
    return torch.where((index_MS >= 0) & (index_MS < here), index_MS, here)
