"""Kimi Delta Attention of sequences whose tokens several ranks share: they pass on its state.

A piece of a sequence does something linear to the state S that enters it: S leaves as M S + F, and
each query reads out = out_0 + out_I S. Ranks compute all of that of their own pieces at once, tell
each other M and F, and put together what enters. Letters: P pieces in all, B of this rank, T tokens
of a piece, H heads, K width of keys, V of values.
"""

import torch
from torch import Tensor

from moebius.ops.kda.absorb import absorb
from moebius.ops.kda.chunk import kda_chunk
from moebius.ops.linear import at_least_fp32
from moebius.ops.ranks import Group
from moebius.ops.sequences import from_pieces, in_pieces, sequences, which


def kda_shared(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    beta_BTH: Tensor,
    first_BT: Tensor,
    group: Group,
) -> Tensor:
    """`moebius.ops.kda.kda` of the pieces that this rank has (`in_pieces`) of sequences."""
    narrow, wide = q_BTHK.dtype, at_least_fp32(q_BTHK.dtype)
    pieces, _, heads, width = k_BTHK.shape
    values = v_BTHV.shape[-1]
    v_BTHV = torch.nn.functional.pad(v_BTHV.to(wide), (0, width))
    same_KK = torch.eye(width, dtype=wide, device=q_BTHK.device).expand(pieces, heads, -1, -1)
    state_BHKX = torch.nn.functional.pad(same_KK, (values, 0))
    given = (q_BTHK.to(wide), k_BTHK, v_BTHV, g_BTHK, beta_BTH)
    out_BTHX, delta_BTHX = kda_chunk(*given, state_BHKX, first_BT)
    # Of what is written, the last document's remains; what enters, where none begins.
    begun_BT = first_BT.cumsum(1)
    last_BT = begun_BT == begun_BT[:, -1:]
    enters_B = begun_BT[:, -1] == 0
    delta_BTHX = delta_BTHX * last_BT[..., None, None]
    state_BHKX = state_BHKX * enters_B[:, None, None, None]
    left_BHKX = absorb(state_BHKX, k_BTHK, delta_BTHX, g_BTHK)
    entering_BHKV = _entering(left_BHKX, values, group)
    out_BTHV, read_BTHK = out_BTHX.split([values, width], dim=-1)
    out_BTHV = out_BTHV + torch.einsum("bthk,bhkv->bthv", read_BTHK, entering_BHKV)
    return out_BTHV.to(narrow)


def _entering(left_BHKX: Tensor, values: int, group: Group) -> Tensor:
    """What enters each piece of this rank, from what every piece does to what enters it."""
    all_PHKX = sequences(from_pieces(left_BHKX[:, None], group), group)
    state_HKV = torch.zeros_like(all_PHKX[:, 0, ..., :values])
    entering: list[Tensor] = []
    for left_HKX in all_PHKX.unbind(1):
        entering.append(state_HKV)
        state_HKV = left_HKX[..., values:] @ state_HKV + left_HKX[..., :values]
    own = torch.stack([entering[piece] for piece in which(group)], dim=1)
    return in_pieces(own, group)[:, 0]
