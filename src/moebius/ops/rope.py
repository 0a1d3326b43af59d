"""Rotary position embedding (Su et al. 2021) on interleaved pairs (DeepSeek, LongCat-Flash).

A pair is a complex number, turned by its angle in at least fp32. Letters: B batch, T sequence, H
heads, R rotated width (even), P = R / 2 pairs.
"""

import torch
from torch import Tensor

from moebius.ops.linear import at_least_fp32


def frequencies(width: int, base: float, like: Tensor) -> Tensor:
    """Radians per position of each pair, `base**(-2i/R)`: [P], at least fp32, where `like` is."""
    wide = at_least_fp32(like.dtype)
    return base ** -(torch.arange(0, width, 2, device=like.device, dtype=wide) / width)


def turn(x_BTHR: Tensor, position_BT: Tensor, frequency_P: Tensor, size: float = 1.0) -> Tensor:
    """Turn pairs (2i, 2i+1) of the last dim by `position * frequency`, and stretch by `size`."""
    wide = frequency_P.dtype
    angle_BTP = position_BT[..., None].to(wide) * frequency_P
    turn_BTP = torch.polar(torch.full_like(angle_BTP, size), angle_BTP)
    pairs_BTHP2 = x_BTHR.to(wide).contiguous().unflatten(-1, (-1, 2))
    turned_BTHP = torch.view_as_complex(pairs_BTHP2) * turn_BTP[:, :, None]
    return torch.view_as_real(turned_BTHP).flatten(-2).to(x_BTHR.dtype)


def rotate(x_BTHR: Tensor, position_BT: Tensor, base: float) -> Tensor:
    """Turn by the plain frequencies of a base."""
    return turn(x_BTHR, position_BT, frequencies(x_BTHR.shape[-1], base, x_BTHR))
