"""Newton-Schulz: matrices made orthogonal by odd polynomials of their singular values.

`naive` are torch's batched products; `native` is the CPU kernel, for bf16, and `step_native` all of
Muon's step in it. M matrices in a stack, R rows, C columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moebius.ops.native import missing
from moebius.ops.orthogonal.naive import Iteration, Polynomial, orthogonal_naive
from moebius.ops.orthogonal.native import Stack, orthogonal_native, step_native

__all__ = ["BACKENDS", "Iteration", "Polynomial", "Stack", "choose", "orthogonal_", "step_native"]

BACKENDS: dict[str, Callable[[Tensor, Iteration], Tensor]] = {
    "naive": orthogonal_naive,
    "native": orthogonal_native,
}


def choose(x_MRC: Tensor, dtype: torch.dtype) -> str:
    """The backend in use for such matrices when they are computed in `dtype`, by name."""
    fits = x_MRC.device.type == "cpu" and dtype == torch.bfloat16
    fits = fits and x_MRC.is_contiguous() and x_MRC.numel() > 0
    fits = fits and all(size % 32 == 0 for size in x_MRC.shape[-2:])
    return "native" if fits and missing() is None else "naive"


def orthogonal_(x_MRC: Tensor, iteration: Iteration) -> Tensor:
    """Each matrix with its singular values near 1; overwrites x_MRC, which may be the result."""
    return BACKENDS[choose(x_MRC, x_MRC.dtype)](x_MRC, iteration)
