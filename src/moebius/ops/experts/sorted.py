"""Experts over rows sorted by expert: one gather, two segmented matrix products, one scatter.

Rows of zero experts sort to the end and are never gathered. M rows = tokens x selected FFN experts.
`segments` is a loop of plain products over slices that are already contiguous; `grouped` is torch's
grouped_mm (bf16 on CUDA).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.ops.swiglu import swiglu

SegmentMatmul = Callable[[Tensor, Tensor, Tensor], Tensor]
Activation = Callable[[Tensor], Tensor]


class _SegmentMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, w_EOI: Tensor, count_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_MI, w_EOI)
        ctx.counts = count_E.tolist()
        y_MO = x_MI.new_empty(x_MI.shape[0], w_EOI.shape[1])
        for x, w, y in zip(x_MI.split(ctx.counts), w_EOI, y_MO.split(ctx.counts), strict=True):
            torch.mm(x, w.T, out=y)
        return y_MO

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x_MI, w_EOI = ctx.saved_tensors
        grad_MO = grad_outputs[0].contiguous()
        grad_x_MI = torch.empty_like(x_MI)
        grad_w_EOI = torch.empty_like(w_EOI)
        rows = (x_MI, grad_MO, grad_x_MI)
        splits = zip(*(row.split(ctx.counts) for row in rows), w_EOI, grad_w_EOI, strict=True)
        for x, grad, grad_x, w, grad_w in splits:
            torch.mm(grad, w, out=grad_x)
            torch.mm(grad.T, x, out=grad_w)
        return grad_x_MI, grad_w_EOI, None


def _segment_matmul(x_MI: Tensor, w_EOI: Tensor, count_E: Tensor) -> Tensor:
    return _SegmentMatmul.apply(x_MI, w_EOI, count_E)  # pyright: ignore


def _grouped_matmul(x_MI: Tensor, w_EOI: Tensor, count_E: Tensor) -> Tensor:
    ends_E = count_E.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_MI, w_EOI.mT, offs=ends_E)


def _biased(y_MO: Tensor, b_EO: Tensor | None, expert_M: Tensor) -> Tensor:
    return y_MO if b_EO is None else y_MO + b_EO.to(y_MO.dtype).index_select(0, expert_M)


def _experts_sorted(
    matmul: SegmentMatmul,
    x_ND: Tensor,
    index_NS: Tensor,
    weight_NS: Tensor,
    w_gate_up_E2FD: Tensor,
    w_down_EDF: Tensor,
    b_gate_up_E2F: Tensor | None,
    b_down_ED: Tensor | None,
    activation: Activation,
) -> Tensor:
    num_experts, num_selected = w_down_EDF.shape[0], index_NS.shape[1]
    flat = index_NS.flatten()
    count_E = torch.bincount(flat, minlength=num_experts)[:num_experts]
    order_M = flat.argsort(stable=True)[: int(count_E.sum())]
    token_M, expert_M = order_M // num_selected, flat[order_M]
    x_MD = x_ND.index_select(0, token_M)
    gate_up_MX = matmul(x_MD, w_gate_up_E2FD.to(x_ND.dtype), count_E)
    hidden_MF = activation(_biased(gate_up_MX, b_gate_up_E2F, expert_M))
    out_MD = matmul(hidden_MF, w_down_EDF.to(x_ND.dtype), count_E)
    out_MD = _biased(out_MD, b_down_ED, expert_M)
    weight_M1 = weight_NS.flatten().index_select(0, order_M)[:, None]
    y_ND = torch.zeros(x_ND.shape, dtype=weight_NS.dtype, device=x_ND.device)
    return y_ND.index_add(0, token_M, out_MD * weight_M1).to(x_ND.dtype)


def experts_segments(
    x_ND: Tensor,
    index_NS: Tensor,
    weight_NS: Tensor,
    w_gate_up_E2FD: Tensor,
    w_down_EDF: Tensor,
    b_gate_up_E2F: Tensor | None = None,
    b_down_ED: Tensor | None = None,
    activation: Activation = swiglu,
) -> Tensor:
    """See `moebius.ops.experts.experts`."""
    weights = (w_gate_up_E2FD, w_down_EDF, b_gate_up_E2F, b_down_ED)
    return _experts_sorted(_segment_matmul, x_ND, index_NS, weight_NS, *weights, activation)


def experts_grouped(
    x_ND: Tensor,
    index_NS: Tensor,
    weight_NS: Tensor,
    w_gate_up_E2FD: Tensor,
    w_down_EDF: Tensor,
    b_gate_up_E2F: Tensor | None = None,
    b_down_ED: Tensor | None = None,
    activation: Activation = swiglu,
) -> Tensor:
    """See `moebius.ops.experts.experts`. Widths D and F must be multiples of 8 (16 bytes)."""
    weights = (w_gate_up_E2FD, w_down_EDF, b_gate_up_E2F, b_down_ED)
    return _experts_sorted(_grouped_matmul, x_ND, index_NS, weight_NS, *weights, activation)
