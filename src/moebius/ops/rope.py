"""Rotary position embedding (Su et al. 2021) on interleaved pairs (DeepSeek, LongCat-Flash).

A pair is a complex number, turned by its angle in at least fp32. Letters: B batch, T sequence, H
heads, R rotated width (even).
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
    turn_BTP = torch.polar(torch.ones_like(angle_BTP), angle_BTP)
    pairs_BTHP2 = x_BTHR.to(wide).contiguous().unflatten(-1, (-1, 2))
    turned_BTHP = torch.view_as_complex(pairs_BTHP2) * turn_BTP[:, :, None]
    return torch.view_as_real(turned_BTHP).flatten(-2).to(x_BTHR.dtype)
