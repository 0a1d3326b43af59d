"""SwiGLU in one pass over memory each way, in fp32 between bf16 and bf16.

Letters: F hidden width.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius.ops.native import address, integer, library, threads

SOURCE = Path(__file__).with_name("native.cpp")


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        hidden = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        sizes = _sizes(hidden)
        library(SOURCE).swiglu(address(gate_up), address(hidden), *sizes, threads())
        ctx.save_for_backward(gate_up)
        return hidden

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gate_up,) = ctx.saved_tensors
        grad, grad_gate_up = grad_outputs[0].contiguous(), torch.empty_like(gate_up)
        tensors = map(address, (grad, gate_up, grad_gate_up))
        library(SOURCE).swiglu_backward(*tensors, *_sizes(grad), threads())
        return grad_gate_up


def _sizes(hidden: Tensor) -> tuple[object, object]:
    width = hidden.shape[-1]
    return integer(hidden.numel() // width), integer(width)


def swiglu_native(gate_up: Tensor) -> Tensor:
    """See `moebius.ops.swiglu.swiglu`. bf16, F a multiple of 16."""
    return _SwiGLU.apply(gate_up)  # pyright: ignore
