"""The truth about the loss: all logits at once, in at least fp32."""

import torch.nn.functional as F
from torch import Tensor

from moebius.ops.linear import at_least_fp32, linear


def head_cross_entropy_naive(
    h_ND: Tensor, w_VD: Tensor, target_N: Tensor, valid_N: Tensor
) -> Tensor:
    """Sum over valid tokens of the negative log-likelihood, in nats."""
    logits_NV = linear(h_ND, w_VD).to(at_least_fp32(h_ND.dtype))
    return F.cross_entropy(logits_NV[valid_N], target_N[valid_N], reduction="sum")
