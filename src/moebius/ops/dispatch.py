"""Expert parallelism: tokens travel to the ranks that hold their experts, and results back.

A token goes once to each rank that holds any of its experts, with its weights; assignments to
zero-computation experts and dropped ones never travel (LongCat-Flash 2.1; DeepSeek-V3 3.2.2).
Equal shares of the experts lie on the ranks of a group in order; on one process nothing moves.
Letters: N tokens here, M rows received, S selected, D width, R ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.ops.ranks import Group, exchange, exchange_counts


@dataclass(frozen=True)
class _Way:
    """Where the rows came from, for the way back."""

    token_M: Tensor
    num_tokens: int
    send: list[int]
    receive: list[int]


@dataclass(frozen=True)
class Dispatched:
    """What this rank's experts are to compute; indices of other ranks' experts are past its own."""

    x_MD: Tensor
    index_MS: Tensor
    weight_MS: Tensor
    way: _Way | None


def dispatch(
    x_ND: Tensor, index_NS: Tensor, weight_NS: Tensor, num_experts: int, group: Group
) -> Dispatched:
    """Send every token to the ranks of its experts; indices from `num_experts` on stay behind."""
    if group is None:
        return Dispatched(x_ND, index_NS, weight_NS, None)
    here = num_experts // group.size()
    rank_R11 = torch.arange(group.size(), device=index_NS.device)[:, None, None]
    goes_RN = (index_NS.div(here, rounding_mode="floor") == rank_R11).any(-1)
    rank_M, token_M = goes_RN.nonzero(as_tuple=True)
    count_R = goes_RN.sum(1)
    send, receive = count_R.tolist(), exchange_counts(count_R, group).tolist()
    index_MS = index_NS[token_M] - (here * rank_M)[:, None]
    index_MS = torch.where((index_MS >= 0) & (index_MS < here), index_MS, here)
    return Dispatched(
        exchange(x_ND[token_M], send, receive, group),
        exchange(index_MS, send, receive, group),
        exchange(weight_NS[token_M], send, receive, group),
        _Way(token_M, len(x_ND), send, receive),
    )


def combine(y_MD: Tensor, sent: Dispatched, group: Group) -> Tensor:
    """The sum of what each rank's experts made of a token, y_ND."""
    way = sent.way
    if way is None or group is None:
        return y_MD
    back_MD = exchange(y_MD, way.receive, way.send, group)
    wide = torch.promote_types(back_MD.dtype, torch.float32)
    y_ND = back_MD.new_zeros(way.num_tokens, back_MD.shape[1], dtype=wide)
    return y_ND.index_add(0, way.token_M, back_MD.to(wide)).to(back_MD.dtype)
