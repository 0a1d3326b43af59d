"""A reference of `bench moe`: experts by one batched product, every expert padded to the fullest.

What torch offers without grouped products, and what many small codes do. Letters: N tokens, D
width, F hidden width, E experts, S selected, M assignments, C rows of the fullest expert.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moebius.ops.swiglu import swiglu


def experts_padded(
    x_ND: Tensor,
    index_NS: Tensor,
    weight_NS: Tensor,
    w_gate_up_E2FD: Tensor,
    w_down_EDF: Tensor,
    b_gate_up_E2F: Tensor | None = None,
    b_down_ED: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = swiglu,
) -> Tensor:
    """See `moebius.ops.experts.experts`; without biases and zero experts."""
    if b_gate_up_E2F is not None or b_down_ED is not None:
        raise ValueError("the padded reference has no biases")
    num_experts, num_selected = w_down_EDF.shape[0], index_NS.shape[1]
    flat_M = index_NS.flatten()
    count_E = torch.bincount(flat_M, minlength=num_experts)
    most = int(count_E.max())
    order_M = flat_M.argsort(stable=True)
    expert_M = flat_M[order_M]
    place_M = (
        torch.arange(len(flat_M), device=x_ND.device) - (count_E.cumsum(0) - count_E)[expert_M]
    )
    slot_M, token_M = expert_M * most + place_M, order_M // num_selected
    x_XD = x_ND.new_zeros(num_experts * most, x_ND.shape[1])
    x_ECD = x_XD.index_copy(0, slot_M, x_ND[token_M]).view(num_experts, most, -1)
    hidden_ECF = activation(torch.bmm(x_ECD, w_gate_up_E2FD.to(x_ND.dtype).mT))
    out_ECD = torch.bmm(hidden_ECF, w_down_EDF.to(x_ND.dtype).mT)
    out_MD = out_ECD.flatten(0, 1)[slot_M] * weight_NS.flatten()[order_M][:, None]
    y_ND = torch.zeros(x_ND.shape, dtype=weight_NS.dtype, device=x_ND.device)
    return y_ND.index_add(0, token_M, out_MD).to(x_ND.dtype)
