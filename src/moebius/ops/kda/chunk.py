"""Kimi Delta Attention in chunks: matrix products within a chunk, a loop over the chunks.

Kimi Linear (arXiv 2510.26692), section 3. The decay between two tokens of a chunk is made of the
decays of halves, of halves of halves and so on, all of them products of numbers of at most 1: no
positive log-decay is ever exponentiated, nothing cancels, nothing overflows. Letters: L chunks, C
tokens of a chunk, X queries and keys side by side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.ops.kda.naive import unit
from moebius.ops.linear import at_least_fp32

# Tokens of a chunk, a power of two. Small, since work within chunks grows with it.
CHUNK = 16


def kda_chunk(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None = None,
    first_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `moebius.ops.kda.kda` and `kda_onward`."""
    narrow, wide, length = q_BTHK.dtype, at_least_fp32(q_BTHK.dtype), q_BTHK.shape[1]
    q_BTHK, k_BTHK = unit(q_BTHK) * q_BTHK.shape[-1] ** -0.5, unit(k_BTHK)
    q_BHLCK, k_BHLCK, v_BHLCV, g_BHLCK, beta_BHLC1 = (
        _in_chunks(x, wide) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH[..., None])
    )
    x_BHLCXK = torch.stack([q_BHLCK, k_BHLCK * beta_BHLC1], dim=-2)
    score_BHLCXC, since_BHLCK, until_BHLCK = _decayed(x_BHLCXK, k_BHLCK, g_BHLCK.exp())
    if first_BT is not None:
        part_BLC = _in_chunks(first_BT[..., None, None], torch.int64)[:, 0, ..., 0].cumsum(-1)
        same_BLCC = part_BLC[..., :, None] == part_BLC[..., None, :]
        score_BHLCXC = score_BHLCXC * same_BLCC[:, None, :, :, None]
        since_BHLCK = since_BHLCK * (part_BLC == 0)[:, None, ..., None]
        until_BHLCK = until_BHLCK * (part_BLC == part_BLC[..., -1:])[:, None, ..., None]
    qk_BHLCC, kk_BHLCC = score_BHLCXC.unbind(-2)
    x_in_BHLCXK = x_BHLCXK * since_BHLCK[..., None, :]
    q_in_BHLCK, k_in_BHLCK = x_in_BHLCXK.unbind(-2)
    right = torch.cat([v_BHLCV * beta_BHLC1, k_in_BHLCK], dim=-1)
    # The solver reads the strict lower triangle alone: the diagonal counts as 1.
    solved = torch.linalg.solve_triangular(kk_BHLCC, right, upper=False, unitriangular=True)
    u_BHLCV, w_BHLCK = solved.split([v_BHLCV.shape[-1], k_BHLCK.shape[-1]], dim=-1)
    carried_BHLCV, delta_BHLCV = _across(
        torch.cat([q_in_BHLCK, w_BHLCK], dim=-2),
        u_BHLCV,
        (k_BHLCK * until_BHLCK).mT,
        since_BHLCK[..., -1, :, None],
        state_BHKV,
    )
    out_BHLCV = carried_BHLCV + qk_BHLCC @ delta_BHLCV
    return _in_sequence(out_BHLCV, length).to(narrow), _in_sequence(delta_BHLCV, length)


def _in_chunks(x_BTHK: Tensor, dtype: torch.dtype) -> Tensor:
    """BTHK -> BHLCK; the last chunk is filled up with zeros, which change nothing."""
    missing = -x_BTHK.shape[1] % CHUNK
    x_BTHK = F.pad(x_BTHK.to(dtype), (0, 0, 0, 0, 0, missing))
    return x_BTHK.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4)


def _in_sequence(x_BHLCV: Tensor, length: int) -> Tensor:
    return x_BHLCV.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]


def _decayed(x_CXK: Tensor, k_CK: Tensor, keep_CK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Products of tokens with the tokens before them, decayed by what lies between.

    Returns score_CXC[t, x, s] = sum over K of x_t k_s prod(keep over s+1..t) for s <= t (0 beyond),
    since_CK = prod(keep over 0..t), and until_CK = prod(keep over t+1..C-1).
    """
    # Blocks of 1 token, which are then joined two by two (the dims before C stay as they are).
    score = (x_CXK * k_CK[..., None, :]).sum(-1)[..., None, :, None]  # [..., blocks, t, X, s]
    since, until = keep_CK[..., None, :], torch.ones_like(keep_CK)[..., None, :]
    half = 1
    while half < CHUNK:
        early_since, late_since = since.unflatten(-3, (-1, 2)).unbind(-3)
        early_until, late_until = until.unflatten(-3, (-1, 2)).unbind(-3)
        late_x = x_CXK.unflatten(-3, (-1, 2, half)).select(-4, 1) * late_since[..., None, :]
        early_k = k_CK.unflatten(-2, (-1, 2, half)).select(-3, 0) * early_until
        cross = (late_x.flatten(-3, -2) @ early_k.mT).unflatten(-2, (half, -1))
        early, late = score.unflatten(-4, (-1, 2)).unbind(-4)
        score = torch.cat([F.pad(early, (0, half)), torch.cat([cross, late], dim=-1)], dim=-3)
        since = torch.cat([early_since, late_since * early_since[..., -1:, :]], dim=-2)
        until = torch.cat([early_until * late_since[..., -1:, :], late_until], dim=-2)
        half *= 2
    return score.squeeze(-4), since.squeeze(-3), until.squeeze(-3)


def _across(
    read_BHLXK: Tensor,
    u_BHLCV: Tensor,
    write_BHLKC: Tensor,
    keep_BHLK1: Tensor,
    state_BHKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loop: what queries read of the state that enters each chunk, and each chunk's deltas."""
    if state_BHKV is None:
        state_BHKV = u_BHLCV.new_zeros(*write_BHLKC[:, :, 0].shape[:-1], u_BHLCV.shape[-1])
    carried: list[Tensor] = []
    deltas: list[Tensor] = []
    inputs = (read_BHLXK, u_BHLCV, write_BHLKC, keep_BHLK1)
    chunks = zip(*(x.unbind(2) for x in inputs), strict=True)
    for read_BHXK, u_BHCV, write_BHKC, keep_BHK1 in chunks:
        carried_BHCV, known_BHCV = (read_BHXK @ state_BHKV).chunk(2, dim=-2)
        deltas.append(u_BHCV - known_BHCV)
        carried.append(carried_BHCV)
        state_BHKV = keep_BHK1 * state_BHKV + write_BHKC @ deltas[-1]
    return torch.stack(carried, dim=2), torch.stack(deltas, dim=2)
