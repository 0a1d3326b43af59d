"""The truth about attention: explicit scores, in at least fp32."""

import torch
from torch import Tensor

from moebius.ops.linear import at_least_fp32


def attention_naive(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    mask_BTS: Tensor,
    scale: float,
    sink_H: Tensor | None = None,
) -> Tensor:
    """See `moebius.ops.attention.attention`."""
    wide = at_least_fp32(q_BTHK.dtype)
    group = q_BTHK.shape[2] // k_BSGK.shape[2]
    k_BSHK = k_BSGK.repeat_interleave(group, dim=2).to(wide)
    v_BSHV = v_BSGV.repeat_interleave(group, dim=2).to(wide)
    score_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK.to(wide), k_BSHK) * scale
    score_BHTS = score_BHTS.masked_fill(~mask_BTS[:, None], float("-inf"))
    if sink_H is not None:
        sink_BHT1 = sink_H.to(wide)[None, :, None, None].expand(*score_BHTS.shape[:3], 1)
        score_BHTS = torch.cat([score_BHTS, sink_BHT1], dim=-1)
    p_BHTS = score_BHTS.softmax(-1)[..., : v_BSHV.shape[1]]
    return torch.einsum("bhts,bshv->bthv", p_BHTS, v_BSHV).to(q_BTHK.dtype)
