"""SwiGLU (Shazeer 2020): `silu(gate) * up`.

`naive` writes it out; `native` is the CPU kernel, for bf16. Letters: F hidden width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moebius.ops.native import missing
from moebius.ops.swiglu.naive import clamped_swiglu, swiglu_naive
from moebius.ops.swiglu.native import swiglu_native

__all__ = ["BACKENDS", "choose", "clamped_swiglu", "swiglu"]

BACKENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "naive": swiglu_naive,
    "native": swiglu_native,
}


def choose(gate_up: Tensor) -> str:
    """The backend in use for this tensor, by name."""
    fits = gate_up.device.type == "cpu" and gate_up.dtype == torch.bfloat16
    fits = fits and gate_up.shape[-1] % 32 == 0 and gate_up.numel() > 0
    return "native" if fits and missing() is None else "naive"


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of a last dim that holds gate then up: [..., 2F] -> [..., F]."""
    return BACKENDS[choose(gate_up)](gate_up)
