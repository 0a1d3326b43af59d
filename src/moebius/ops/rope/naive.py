"""The truth about rotary positions: a pair is a complex number, turned by its angle."""

import torch
from torch import Tensor


def turn_naive(x_BTHK: Tensor, angle_BTP: Tensor, size: float) -> Tensor:
    """See `moebius.ops.rope.turn`."""
    still, rotated = x_BTHK.shape[-1] - 2 * angle_BTP.shape[-1], 2 * angle_BTP.shape[-1]
    x_BTHS, x_BTHR = x_BTHK.split([still, rotated], dim=-1)
    turn_BTP = torch.polar(torch.full_like(angle_BTP, size), angle_BTP)
    pairs_BTHP2 = x_BTHR.to(angle_BTP.dtype).contiguous().unflatten(-1, (-1, 2))
    turned_BTHP = torch.view_as_complex(pairs_BTHP2) * turn_BTP[:, :, None]
    turned_BTHR = torch.view_as_real(turned_BTHP).flatten(-2).to(x_BTHK.dtype)
    return torch.cat([x_BTHS, turned_BTHR], dim=-1) if still else turned_BTHR
