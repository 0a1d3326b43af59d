"""Experts as one kernel for the CPU (`native.cpp`): rows sorted once, products of tiles in cache.

It takes bf16 activations, SwiGLU without biases and widths that are multiples of 32; its weights
are the masters themselves, whose gradients arrive in fp32. Results do not depend on the number of
threads. Letters: X = 2F, gate and up; M rows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.ops import native
from moebius.ops.swiglu import swiglu

SOURCE = Path(__file__).with_name("native.cpp")
WIDTH = 32


def unfit(
    w_down_EDF: Tensor | None, biased: bool, activation: Callable[[Tensor], Tensor]
) -> str | None:
    """Why the kernel does not take such experts on this machine; None where it does."""
    _, width, hidden = (1, WIDTH, WIDTH) if w_down_EDF is None else w_down_EDF.shape
    if width % WIDTH or hidden % WIDTH:
        return f"widths {width} and {hidden} are not multiples of {WIDTH}"
    if biased:
        return "experts have biases"
    if activation is not swiglu:
        return "the activation is not SwiGLU"
    return native.missing()


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        index_NS: Tensor,
        weight_NS: Tensor,
        w_gate_up_E2FD: Tensor,
        w_down_EDF: Tensor,
        learning: bool,
    ) -> Tensor:
        num_experts, width, hidden = w_down_EDF.shape
        order_M, row_NS = torch.empty_like(index_NS).flatten(), torch.empty_like(index_NS)
        start_E = index_NS.new_empty(num_experts + 1)
        order, row, start = (native.address(x) for x in (order_M, row_NS, start_E))
        sizes = (native.integer(index_NS.numel()), native.integer(num_experts))
        native.library(SOURCE).experts_sort(native.address(index_NS), *sizes, order, row, start)
        num_rows = int(start_E[-1])
        gate_up_MX = x_ND.new_empty(num_rows, 2 * hidden) if learning else None
        out_MD, y_ND = x_ND.new_empty(num_rows, width), torch.empty_like(x_ND)
        given = (order_M, row_NS, start_E, weight_NS, x_ND, w_gate_up_E2FD, w_down_EDF)
        tensors = [native.address(x) for x in (*given, gate_up_MX, out_MD, y_ND)]
        native.library(SOURCE).experts_forward(*tensors, *_sizes(index_NS, w_down_EDF))
        if learning:
            ctx.save_for_backward(*given, gate_up_MX)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_ND = grad_outputs[0].contiguous()
        saved = ctx.saved_tensors
        _, row_NS, _, weight_NS, x_ND, *weights, gate_up_MX = saved
        of_x, _, _, of_gate_up, of_down, _ = ctx.needs_input_grad
        grad_x_MD = x_ND.new_empty(len(gate_up_MX), x_ND.shape[1]) if of_x else None
        grad_x_ND = torch.empty_like(x_ND) if of_x else None
        grad_weight_NS = torch.zeros_like(weight_NS)
        masters = zip(weights, (of_gate_up, of_down), strict=True)
        grads = [torch.empty_like(w, dtype=torch.float32) if of else None for w, of in masters]
        made = (grad_x_MD, grad_x_ND, grad_weight_NS, *grads)
        tensors = [native.address(x) for x in (*saved, grad_ND, *made)]
        native.library(SOURCE).experts_backward(*tensors, *_sizes(row_NS, weights[1]))
        grads = [None if grad is None else grad.to(weights[0].dtype) for grad in grads]
        return grad_x_ND, None, grad_weight_NS, *grads, None


def _sizes(index_NS: Tensor, w_down_EDF: Tensor) -> list[Any]:
    num_experts, width, hidden = w_down_EDF.shape
    rounded = int(w_down_EDF.dtype == torch.bfloat16)
    sizes = (*index_NS.shape, width, hidden, num_experts, rounded)
    return [*map(native.integer, sizes), native.threads()]


def experts_native(
    x_ND: Tensor,
    index_NS: Tensor,
    weight_NS: Tensor,
    w_gate_up_E2FD: Tensor,
    w_down_EDF: Tensor,
    b_gate_up_E2F: Tensor | None = None,
    b_down_ED: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = swiglu,
) -> Tensor:
    """See `moebius.ops.experts.experts`. ValueError where the kernel does not take the inputs."""
    biased = b_gate_up_E2F is not None or b_down_ED is not None
    reason = unfit(w_down_EDF, biased, activation)
    if reason is None and x_ND.dtype != torch.bfloat16:
        reason = f"activations are {x_ND.dtype}"
    if reason is not None:
        raise ValueError(f"native experts: {reason}; use segments")
    inputs = (x_ND, weight_NS, w_gate_up_E2FD, w_down_EDF)
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    weights = [w.contiguous() for w in (w_gate_up_E2FD, w_down_EDF)]
    if weights[0].dtype != weights[1].dtype or weights[0].dtype != torch.bfloat16:
        weights = [w.float() for w in weights]
    rows = (x_ND.contiguous(), index_NS.contiguous(), weight_NS.float().contiguous())
    return _Experts.apply(*rows, *weights, learning)  # pyright: ignore
