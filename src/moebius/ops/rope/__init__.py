"""Rotary position embedding (Su et al. 2021) on interleaved pairs (DeepSeek, LongCat-Flash).

Angles are of at least fp32. `naive` turns complex numbers; `native` is the CPU kernel, for bf16.
Letters: B batch, T sequence, H heads, K head width, the last R of which are rotated, P = R / 2
pairs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moebius.ops.linear import at_least_fp32
from moebius.ops.native import missing
from moebius.ops.rope.naive import turn_naive
from moebius.ops.rope.native import turn_native

BACKENDS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "naive": turn_naive,
    "native": turn_native,
}


def choose(x: Tensor) -> str:
    """The backend in use for this tensor, by name."""
    fits = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() > 0
    return "native" if fits and missing() is None else "naive"


def frequencies(width: int, base: float, like: Tensor) -> Tensor:
    """Radians per position of each pair, `base**(-2i/R)`: [P], at least fp32, where `like` is."""
    wide = at_least_fp32(like.dtype)
    return base ** -(torch.arange(0, width, 2, device=like.device, dtype=wide) / width)


def turn(x_BTHK: Tensor, position_BT: Tensor, frequency_P: Tensor, size: float = 1.0) -> Tensor:
    """Turn pairs (2i, 2i+1) of the last 2P dims by `position * frequency`, stretch by `size`.

    The dims before them stay as they are.
    """
    angle_BTP = position_BT[..., None].to(frequency_P.dtype) * frequency_P
    return BACKENDS[choose(x_BTHK)](x_BTHK, angle_BTP, size)


def rotate(x_BTHR: Tensor, position_BT: Tensor, base: float) -> Tensor:
    """Turn by the plain frequencies of a base."""
    return turn(x_BTHR, position_BT, frequencies(x_BTHR.shape[-1], base, x_BTHR))
