"""The expert op: each token's rows through the experts chosen for it, weighted and summed.

`naive` (a loop over experts) is the truth in any precision; `segments` sorts the rows once and
runs one matrix product a segment, the fast path on a CPU; `grouped` hands the same sorted rows to
torch's grouped_mm, the fast path on CUDA. Experts are SwiGLU; weights in the layout E2FD and EDF.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moebius.ops.experts.naive import experts_naive
from moebius.ops.experts.sorted import experts_grouped, experts_segments
from moebius.ops.linear import swiglu

Activation = Callable[[Tensor], Tensor]
ExpertOp = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Activation], Tensor
]

BACKENDS: dict[str, ExpertOp] = {
    "naive": experts_naive,
    "segments": experts_segments,
    "grouped": experts_grouped,
}


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The backend in use on a device, by name."""
    return "grouped" if device.type == "cuda" and dtype == torch.bfloat16 else "segments"


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
    op = BACKENDS[choose(x_ND.device, x_ND.dtype)]
    weights = (w_gate_up_E2FD, w_down_EDF, b_gate_up_E2F, b_down_ED)
    return op(x_ND, index_NS, weight_NS, *weights, activation)
