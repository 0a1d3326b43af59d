"""Attention to compressed blocks, and the choice of blocks by what it saw (NSA, eqs. 7 to 12).

Letters: C compressed blocks, J selection blocks of a document, X chosen blocks, Q query heads of
one key head (H = G * Q).
"""

import torch
from torch import Tensor

from moebius.ops.linear import at_least_fp32


def compressed_attention(
    q_BTHK: Tensor, k_BCGK: Tensor, v_BCGK: Tensor, visible_BTC: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to visible blocks, and its probabilities summed over each key head's query heads.

    A query that sees no block gets zeros. -> out_BTHK in the dtype of q, p_BGTC in at least fp32.
    """
    heads = k_BCGK.shape[2]
    wide = at_least_fp32(q_BTHK.dtype)
    q_BGQTK = q_BTHK.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)
    k_BG1KC = k_BCGK.permute(0, 2, 3, 1)[:, :, None]
    v_BG1CK = v_BCGK.transpose(1, 2)[:, :, None]
    score_BGQTC = q_BGQTK.to(wide) @ k_BG1KC.to(wide) * scale
    hidden = ~visible_BTC[:, None, None]
    # The least number and not -inf: a row without a visible block must be zeros, not NaN.
    score_BGQTC = score_BGQTC.masked_fill(hidden, torch.finfo(wide).min)
    p_BGQTC = score_BGQTC.softmax(-1).masked_fill(hidden, 0.0)
    out_BGQTK = p_BGQTC.to(v_BCGK.dtype) @ v_BG1CK
    return out_BGQTK.permute(0, 3, 1, 2, 4).flatten(2, 3), p_BGQTC.detach().sum(2)


def importance(
    p_BGTC: Tensor, block_BC: Tensor, num_blocks: int, block: int, stride: int, width: int
) -> Tensor:
    """How much each selection block matters to a query: p of what overlaps it, [B, G, T, J].

    Compressed block i covers `block` positions from i * stride, selection block j `width` from
    j * width. Each shared run of `stride` positions counts p once: the paper's double sum, which
    is printed for blocks counted from 1.
    """
    start_BC1 = block_BC[:, :, None] * stride
    first_J = torch.arange(num_blocks, device=p_BGTC.device) * width
    end_BCJ = torch.minimum(start_BC1 + block, first_J + width)
    shared_BCJ = (end_BCJ - torch.maximum(start_BC1, first_J)).clamp(min=0) // stride
    return p_BGTC @ shared_BCJ[:, None].to(p_BGTC.dtype)


def choose_blocks(importance_BGTJ: Tensor, own_BT: Tensor, num_chosen: int) -> Tensor:
    """The blocks of each query: its own, the one before, the first, then the most important.

    Blocks after its own are never chosen; -1 stands where fewer than `num_chosen` exist. Of blocks
    that do not matter at all the nearer comes first. -> index_BGTX (int64).
    """
    index_J = torch.arange(importance_BGTJ.shape[-1], device=own_BT.device)
    own_B1T1 = own_BT[:, None, :, None]
    forced = (index_J == 0) | (index_J == own_B1T1) | (index_J == own_B1T1 - 1)
    rank_BGTJ = importance_BGTJ + 1e-30 * (index_J + 1)
    rank_BGTJ = rank_BGTJ.masked_fill(forced, float("inf"))
    rank_BGTJ = rank_BGTJ.masked_fill(index_J > own_B1T1, float("-inf"))
    # topk, and nothing else, is what recompute saves: the choice of a query is made once.
    value_BGTX, index_BGTX = rank_BGTJ.topk(num_chosen, dim=-1)
    return index_BGTX.masked_fill(value_BGTX == float("-inf"), -1)
