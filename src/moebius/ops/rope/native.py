"""Rotary positions in one pass over memory: the turned dims turned, those before them copied.

The same kernel turns gradients back. Letters: B batch, T sequence, H heads, K head width, R of
which are rotated, P = R / 2 pairs.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius.ops.native import address, integer, library, real, threads

SOURCE = Path(__file__).with_name("native.cpp")


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cosine_BTP: Tensor, sine_BTP: Tensor) -> Tensor:
        ctx.save_for_backward(cosine_BTP, sine_BTP)
        return _turn(x_BTHK, cosine_BTP, sine_BTP, 1.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        cosine_BTP, sine_BTP = ctx.saved_tensors
        return _turn(grad_outputs[0], cosine_BTP, sine_BTP, -1.0), None, None


def _turn(x_BTHK: Tensor, cosine_BTP: Tensor, sine_BTP: Tensor, sign: float) -> Tensor:
    batch, length, heads, width = x_BTHK.shape
    even = x_BTHK.stride(3) == 1 and x_BTHK.stride(0) == length * x_BTHK.stride(1)
    x_BTHK = x_BTHK if even else x_BTHK.contiguous()
    y_BTHK = x_BTHK.new_empty(x_BTHK.shape)
    library(SOURCE).rope(
        address(x_BTHK, strided=True),
        integer(x_BTHK.stride(1)),
        integer(x_BTHK.stride(2)),
        *map(address, (cosine_BTP, sine_BTP, y_BTHK)),
        *map(integer, (batch * length, heads, width, 2 * cosine_BTP.shape[-1])),
        real(sign),
        threads(),
    )
    return y_BTHK


def turn_native(x_BTHK: Tensor, angle_BTP: Tensor, size: float) -> Tensor:
    """See `moebius.ops.rope.turn`. x in bf16, angles in fp32."""
    cosine_BTP, sine_BTP = (angle_BTP.cos() * size, angle_BTP.sin() * size)
    return _Turn.apply(x_BTHK, cosine_BTP, sine_BTP)  # pyright: ignore
