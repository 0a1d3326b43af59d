"""The truth about SwiGLU, and the clamped kind of gpt-oss."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_naive(gate_up: Tensor) -> Tensor:
    """See `moebius.ops.swiglu.swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """gpt-oss: `gate * sigmoid(alpha * gate) * (up + 1)`, gate <= limit and |up| <= limit."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)
