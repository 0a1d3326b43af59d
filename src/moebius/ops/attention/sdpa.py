"""Attention by torch's scaled_dot_product_attention.

Two things are arranged so that the fused kernels stay in reach: the narrower of the key and value
widths is padded with zeros (exact), and a learned sink (gpt-oss) is a zero key and value whose
additive mask is the sink's logit (exact). Letters: B batch, T queries, S keys, H query heads, G
key heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries of a causal mask go in blocks of this many on a CPU, and skip the keys none of them sees.
BLOCK = 256


def attention_sdpa(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    mask_BTS: Tensor,
    scale: float,
    sink_H: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """See `moebius.ops.attention.attention`."""
    length = q_BTHK.shape[1]
    if not causal or length != k_BSGK.shape[1] or length <= BLOCK or q_BTHK.device.type != "cpu":
        return _attend(q_BTHK, k_BSGK, v_BSGV, mask_BTS, scale, sink_H)
    blocks: list[Tensor] = []
    for start in range(0, length, BLOCK):
        first = 0 if window is None else max(0, start - window + 1)
        rows, keys = slice(start, start + BLOCK), slice(first, min(start + BLOCK, length))
        q, k, v = q_BTHK[:, rows], k_BSGK[:, keys], v_BSGV[:, keys]
        blocks.append(_attend(q, k, v, mask_BTS[:, rows, keys], scale, sink_H))
    return torch.cat(blocks, dim=1)


def _attend(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    mask_BTS: Tensor,
    scale: float,
    sink_H: Tensor | None,
) -> Tensor:
    value_width = v_BSGV.shape[-1]
    width = max(q_BTHK.shape[-1], value_width)
    q_BHTK, k_BGSK, v_BGSV = (
        F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV)
    )
    mask = mask_BTS[:, None]
    if sink_H is not None:
        k_BGSK, v_BGSV = F.pad(k_BGSK, (0, 0, 1, 0)), F.pad(v_BGSV, (0, 0, 1, 0))
        zero_BHTS = torch.zeros(mask.shape, dtype=q_BTHK.dtype, device=mask.device)
        bias_BHTS = zero_BHTS.masked_fill(~mask, float("-inf"))
        bias_BHTS = bias_BHTS.expand(-1, sink_H.shape[0], -1, -1)
        sink_BHT1 = sink_H.to(q_BTHK.dtype)[None, :, None, None]
        mask = torch.cat([sink_BHT1.expand(*bias_BHTS.shape[:3], 1), bias_BHTS], dim=-1)
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    out_BHTV = F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSV, attn_mask=mask, scale=scale, enable_gqa=grouped
    )
    return out_BHTV.transpose(1, 2)[..., :value_width]
