"""Root-mean-square normalisation over the last dim (Zhang and Sennrich 2019).

`naive` is torch's own; `native` the CPU kernel, for bf16 activations with fp32 weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moebius.ops.native import missing
from moebius.ops.norm.naive import rms_norm_naive
from moebius.ops.norm.native import rms_norm_native
from moebius.ops.norm.spread import rms_norm_spread
from moebius.ops.ranks import Group

BACKENDS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "naive": rms_norm_naive,
    "native": rms_norm_native,
}


def choose(x: Tensor, w_D: Tensor) -> str:
    """The backend in use for these tensors, by name."""
    kinds = (x.device.type, x.dtype, w_D.dtype)
    fits = kinds == ("cpu", torch.bfloat16, torch.float32) and x.numel() > 0
    return "native" if fits and missing() is None else "naive"


def rms_norm(x: Tensor, w_D: Tensor, eps: float, group: Group = None) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * w_D` over the last dim, in the dtype of x.

    With a group, each rank gives and gets an equal part of that dim.
    """
    if group is not None:
        return rms_norm_spread(x, w_D, eps, group)
    return BACKENDS[choose(x, w_D)](x, w_D, eps)
