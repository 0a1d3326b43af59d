"""Attention to chosen blocks as masked attention over all tokens: exact, quadratic, any device.

Key heads choose on their own, so each becomes a row of the batch with a mask of its own. Letters
as in `blocks`; R rows, B * G.
"""

import torch
from torch import Tensor

from moebius.ops.attention import attention


def selected_dense(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    index_BGTX: Tensor,
    position_BS: Tensor,
    attend_BTS: Tensor,
    width: int,
    scale: float,
) -> Tensor:
    """See `moebius.ops.nsa.selected_attention`."""
    batch, keys, heads = k_BSGK.shape[:3]
    q_RTQK = q_BTHK.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)
    k_RS1K, v_RS1K = (x.transpose(1, 2).flatten(0, 1)[:, :, None] for x in (k_BSGK, v_BSGK))
    mask_BGTS = _chosen(index_BGTX, position_BS // width, -(-keys // width)) & attend_BTS[:, None]
    square = q_BTHK.shape[1] == keys
    out_RTQK = attention(q_RTQK, k_RS1K, v_RS1K, mask_BGTS.flatten(0, 1), scale, causal=square)
    return out_RTQK.unflatten(0, (batch, heads)).transpose(1, 2).flatten(2, 3)


def _chosen(index_BGTX: Tensor, block_BS: Tensor, num_blocks: int) -> Tensor:
    """chosen_BGTS: whether the block of a token is among those of a query."""
    shape = (*index_BGTX.shape[:3], num_blocks + 1)
    chosen_BGTJ = torch.zeros(shape, dtype=torch.bool, device=index_BGTX.device)
    # No block (-1) becomes one block more, which no token is in.
    chosen_BGTJ = chosen_BGTJ.scatter(-1, index_BGTX % (num_blocks + 1), True)
    return chosen_BGTJ.gather(-1, block_BS[:, None, None].expand(*shape[:3], -1))
