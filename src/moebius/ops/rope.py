"""Rotary position embedding (Su et al. 2021) on interleaved pairs, as DeepSeek and LongCat store
it.

Angles are computed in fp32 from integer positions. Letters: B batch, T sequence, H heads, R
rotated width (even).
"""

import torch
from torch import Tensor

from moebius.ops.linear import at_least_fp32


def rotate(x_BTHR: Tensor, position_BT: Tensor, base: float) -> Tensor:
    """Rotate pairs (2i, 2i+1) of the last dim by `position * base**(-2i/R)`."""
    rotated_width = x_BTHR.shape[-1]
    wide = at_least_fp32(x_BTHR.dtype)
    exponent = torch.arange(0, rotated_width, 2, device=x_BTHR.device, dtype=wide) / rotated_width
    angle_BTP = position_BT[..., None].to(wide) * base**-exponent
    cos_BT1P = angle_BTP.cos()[:, :, None].to(x_BTHR.dtype)
    sin_BT1P = angle_BTP.sin()[:, :, None].to(x_BTHR.dtype)
    even, odd = x_BTHR[..., 0::2], x_BTHR[..., 1::2]
    pairs = (even * cos_BT1P - odd * sin_BT1P, even * sin_BT1P + odd * cos_BT1P)
    return torch.stack(pairs, dim=-1).flatten(-2)
