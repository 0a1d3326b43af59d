"""The elementwise-precision rule of the house: weights follow the dtype of the activations.

Master weights may be fp32 while activations are bf16; the cast is part of the graph, so gradients
arrive in the dtype of the master weights. Letters: docs/letters.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, w_OI: Tensor, b_O: Tensor | None = None) -> Tensor:
    """`x @ w_OI.T + b_O` in the dtype of x: [..., I] -> [..., O]."""
    return F.linear(x, w_OI.to(x.dtype), None if b_O is None else b_O.to(x.dtype))


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precisions, the dtype itself otherwise (fp64 is never forced down)."""
    return torch.promote_types(dtype, torch.float32)
