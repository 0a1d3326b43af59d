"""Context parallelism: ranks share the tokens of a sequence and see the keys and values of all.

Each rank has two pieces, one from the front and one from the back; keys and values are gathered
before attention, which is cheap beside it where few heads carry them (Llama 3, 3.3.2). What goes
through a sequence in order takes each piece for one of its own. Letters: B
sequences, T tokens here, S tokens of whole sequences.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.ops.ranks import Group, rank_in, size_of


def which(group: Group) -> tuple[int, ...]:
    """The numbers of the pieces that this rank has, in the order of the sequence."""
    if group is None:
        return (0,)
    return (rank_in(group), 2 * size_of(group) - 1 - rank_in(group))


def in_pieces(x_BTX: Tensor, group: Group) -> Tensor:
    """The pieces of sequences as sequences of their own: those at the front, then those behind."""
    return torch.cat(x_BTX.chunk(len(which(group)), dim=1))


def from_pieces(x_BTX: Tensor, group: Group) -> Tensor:
    """The tokens of a rank, from its pieces."""
    return torch.cat(x_BTX.chunk(len(which(group))), dim=1)


def before(x_BTX: Tensor, num: int, group: Group) -> Tensor:
    """The `num` tokens before each of a rank's pieces, zeros before a sequence."""
    none = x_BTX.new_zeros(len(x_BTX), num, *x_BTX.shape[2:])
    if group is None or num == 0:
        return none
    # Where pieces are shorter, the ends of several are needed.
    length = min(num, x_BTX.shape[1])
    ends = sequences(from_pieces(x_BTX[:, x_BTX.shape[1] - length :], group), group)
    ends = torch.cat([none[: len(ends)], ends], dim=1)
    return torch.cat([ends[:, n * length : n * length + num] for n in which(group)])


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
        parts = torch.cat(by_rank.chunk(group.size(), dim=1))
        # Added up in fp32 at least.
        parts = parts.to(torch.promote_types(parts.dtype, torch.float32))
        grad_BTX = parts.new_empty(len(grad_BSX), *parts.shape[1:])
        dist.reduce_scatter_tensor(grad_BTX, parts, group=group)
        return grad_BTX.to(grad_BSX.dtype), None


def _order(length: int, group: Group, device: torch.device) -> Tensor:
    """The places of all ranks' tokens, one rank after the other."""
    return torch.cat([torch.cat(pair) for pair in _pieces(length, group, device)])


def own_places(x_BSX: Tensor, place_T: Tensor, group: Group) -> Tensor:
    """Of whole sequences the tokens that this rank has."""
    return x_BSX if group is None else x_BSX[:, place_T]


def sequences(x_BTX: Tensor, group: Group) -> Tensor:
    """Whole sequences, in order, of what each rank has for its tokens of them (`places`)."""
    return x_BTX if group is None else _Sequences.apply(x_BTX, group)  # pyright: ignore
