"""Experts over rows sorted by expert: one gather, two segmented matrix products, one scatter.

Rows of zero experts sort to the end and are never gathered. M rows = tokens x selected FFN experts,
P the same with segments filled up to lengths that recur. `segments` is a loop of plain products
over slices that are already contiguous; `grouped` is torch's grouped_mm (bf16 on CUDA).
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


def filled(count: int) -> int:
    """A segment's length with room at its end: at most an eighth more, eight lengths an octave."""
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step


def _fill(order_M: Tensor, count_E: Tensor, empty: int) -> tuple[Tensor, Tensor]:
    """Segments filled up with the assignment `empty`; order_P and the counts.

    On a CPU each new shape of a product in bf16 costs more than the product of a short segment.
    """
    room_E = count_E.new_tensor([filled(count) for count in count_E.tolist()])
    shift_E = (room_E - count_E).cumsum(0) - (room_E - count_E)
    place_M = torch.arange(len(order_M)) + shift_E.repeat_interleave(count_E)
    order_P = order_M.new_full((int(room_E.sum()),), empty)
    return order_P.index_copy(0, place_M, order_M), room_E


def _experts_sorted(
    matmul: SegmentMatmul,
    fill: bool,
    x_ND: Tensor,
    index_NS: Tensor,
    weight_NS: Tensor,
    w_gate_up_E2FD: Tensor,
    w_down_EDF: Tensor,
    b_gate_up_E2F: Tensor | None,
    b_down_ED: Tensor | None,
    activation: Activation,
) -> Tensor:
    num_experts, num_tokens = w_down_EDF.shape[0], len(x_ND)
    expert, weight = index_NS.flatten(), weight_NS.flatten()
    count_E = torch.bincount(expert, minlength=num_experts)[:num_experts]
    order_M = expert.argsort(stable=True)[: int(count_E.sum())]
    if fill:
        # One token more, of zeros and no weight, whose output is dropped.
        order_M, count_E = _fill(order_M, count_E, len(expert))
        expert, weight, x_ND = (
            F.pad(expert, (0, 1)),
            F.pad(weight, (0, 1)),
            F.pad(x_ND, (0, 0, 0, 1)),
        )
    token_M, expert_M = order_M // index_NS.shape[1], expert[order_M]
    x_MD = x_ND.index_select(0, token_M)
    gate_up_MX = matmul(x_MD, w_gate_up_E2FD.to(x_ND.dtype), count_E)
    hidden_MF = activation(_biased(gate_up_MX, b_gate_up_E2F, expert_M))
    out_MD = matmul(hidden_MF, w_down_EDF.to(x_ND.dtype), count_E)
    out_MD = _biased(out_MD, b_down_ED, expert_M)
    weight_M1 = weight.index_select(0, order_M)[:, None]
    y_ND = torch.zeros(x_ND.shape, dtype=weight_NS.dtype, device=x_ND.device)
    return y_ND.index_add(0, token_M, out_MD * weight_M1)[:num_tokens].to(x_ND.dtype)


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
    fill = x_ND.device.type == "cpu" and x_ND.dtype in (torch.bfloat16, torch.float16)
    return _experts_sorted(_segment_matmul, fill, x_ND, index_NS, weight_NS, *weights, activation)


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
    return _experts_sorted(_grouped_matmul, False, x_ND, index_NS, weight_NS, *weights, activation)
