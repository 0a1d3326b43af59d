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


def rms_norm(x: Tensor, w_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dim, scaled by w_D (Zhang & Sennrich 2019)."""
    return F.rms_norm(x, (x.shape[-1],), w_D.to(x.dtype), eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of a last dim that holds gate then up: [..., 2F] -> [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """gpt-oss: `gate * sigmoid(alpha * gate) * (up + 1)`, gate <= limit and |up| <= limit."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)
