"""The expert op: each token's rows through the experts chosen for it, weighted and summed.

`naive` (a loop over experts) is the truth in any precision; `native` is one kernel for bf16 on a
CPU; `segments` sorts the rows once and runs one matrix product a segment, for all else; `grouped`
hands the same sorted rows to torch's grouped_mm, the fast path on CUDA. Weights that carry a
product take `quantised` instead. Experts are SwiGLU; weights in the layout E2FD and EDF.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moebius.ops.experts.naive import experts_naive
from moebius.ops.experts.native import experts_native, unfit
from moebius.ops.experts.quantised import describe, experts_quantised, product_of
from moebius.ops.experts.sorted import experts_grouped, experts_segments
from moebius.ops.swiglu import swiglu

Activation = Callable[[Tensor], Tensor]
ExpertOp = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Activation], Tensor
]

BACKENDS: dict[str, ExpertOp] = {
    "naive": experts_naive,
    "native": experts_native,
    "segments": experts_segments,
    "grouped": experts_grouped,
}


def choose(
    device: torch.device,
    dtype: torch.dtype,
    w_down_EDF: Tensor | None = None,
    biased: bool = False,
    activation: Activation = swiglu,
) -> str:
    """The backend in use on a device, by name, for such experts (None: of fitting widths)."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        return "grouped"
    fits = device.type == "cpu" and dtype == torch.bfloat16
    return "native" if fits and unfit(w_down_EDF, biased, activation) is None else "segments"


def in_use(
    device: torch.device,
    dtype: torch.dtype,
    w_down_EDF: Tensor,
    biased: bool = False,
    activation: Activation = swiglu,
) -> str:
    """The name of the backend and, where a CPU in bf16 cannot use its kernel, the reason."""
    product = product_of(w_down_EDF)
    if product is not None:
        return describe(product, torch.empty(0, dtype=dtype, device=device))
    name = choose(device, dtype, w_down_EDF, biased, activation)
    if name != "segments" or device.type != "cpu" or dtype != torch.bfloat16:
        return name
    return f"{name} ({unfit(w_down_EDF, biased, activation)})"


def experts(
    x_ND: Tensor,
    index_NS: Tensor,
    weight_NS: Tensor,
    w_gate_up_E2FD: Tensor,
    w_down_EDF: Tensor,
    b_gate_up_E2F: Tensor | None = None,
    b_down_ED: Tensor | None = None,
    activation: Activation = swiglu,
) -> Tensor:
    """Sum over selected experts of `weight * FFN_e(x)`; indices >= E (zero experts) are skipped.

    FFN_e is `down(activation(gate_up(x)))`, SwiGLU unless another activation [..., 2F] -> [..., F]
    is given. Shapes: x_ND, index_NS (int64), weight_NS (at least fp32) -> y_ND in the dtype of x.
    """
    biased = b_gate_up_E2F is not None or b_down_ED is not None
    op = BACKENDS[choose(x_ND.device, x_ND.dtype, w_down_EDF, biased, activation)]
    weights = (w_gate_up_E2FD, w_down_EDF, b_gate_up_E2F, b_down_ED)
    if product_of(w_gate_up_E2FD, w_down_EDF) is not None:
        op = experts_quantised
    return op(x_ND, index_NS, weight_NS, *weights, activation)
