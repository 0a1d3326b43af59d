"""The truth about experts: a Python loop over them, in any precision."""

from collections.abc import Callable

import torch
from torch import Tensor

from moebius.ops.linear import linear
from moebius.ops.swiglu import swiglu


def experts_naive(
    x_ND: Tensor,
    index_NS: Tensor,
    weight_NS: Tensor,
    w_gate_up_E2FD: Tensor,
    w_down_EDF: Tensor,
    b_gate_up_E2F: Tensor | None = None,
    b_down_ED: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = swiglu,
) -> Tensor:
    """See `moebius.ops.experts.experts`."""
    y_ND = torch.zeros(x_ND.shape, dtype=weight_NS.dtype, device=x_ND.device)
    for expert in range(w_down_EDF.shape[0]):
        b_2F = None if b_gate_up_E2F is None else b_gate_up_E2F[expert]
        b_D = None if b_down_ED is None else b_down_ED[expert]
        token_M, slot_M = (index_NS == expert).nonzero(as_tuple=True)
        hidden_MF = activation(linear(x_ND[token_M], w_gate_up_E2FD[expert], b_2F))
        out_MD = linear(hidden_MF, w_down_EDF[expert], b_D)
        y_ND = y_ND.index_add(0, token_M, out_MD * weight_NS[token_M, slot_M, None])
    return y_ND.to(x_ND.dtype)
