"""RMSNorm in one pass over memory each way, in fp32 between bf16 and bf16.

Letters: N rows, D width.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius.ops.native import address, integer, library, real, rows_apart, threads

SOURCE = Path(__file__).with_name("native.cpp")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_D: Tensor, eps: float) -> Tensor:
        x_ND, stride = rows_apart(x)
        y, inverse_N = x.new_empty(x.shape), x.new_empty(x_ND.shape[0], dtype=torch.float32)
        library(SOURCE).rms_norm(
            address(x_ND, strided=True),
            integer(stride),
            address(w_D),
            address(y),
            address(inverse_N),
            *map(integer, x_ND.shape),
            real(eps),
            threads(),
        )
        ctx.save_for_backward(x_ND, w_D, inverse_N)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x_ND, w_D, inverse_N = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        grad_x, grad_w_D = torch.empty_like(grad), torch.empty_like(w_D)
        library(SOURCE).rms_norm_backward(
            address(grad),
            address(x_ND, strided=True),
            integer(x_ND.stride(0)),
            *map(address, (w_D, inverse_N, grad_x, grad_w_D)),
            *map(integer, x_ND.shape),
            threads(),
        )
        return grad_x, grad_w_D, None


def rms_norm_native(x: Tensor, w_D: Tensor, eps: float) -> Tensor:
    """See `moebius.ops.norm.rms_norm`. x in bf16, w_D in fp32."""
    return _RMSNorm.apply(x, w_D, eps)  # pyright: ignore
