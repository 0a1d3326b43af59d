"""Kimi Delta Attention by the Triton kernels of fla-core, forward and backward.

Needs CUDA, the package fla-core (with torch >= 2.7 and triton >= 3.3), heads of at most MAX_WIDTH,
and inputs of bf16, fp16 or fp32 (which Triton may multiply in TF32). It is imported only here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_WIDTH = 256


def kda_fla(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    beta_BTH: Tensor,
    first_BT: Tensor,
) -> Tensor:
    """See `moebius.ops.kda.kda`. Documents go to the kernel as sequences of unequal lengths."""
    from fla.ops.kda import chunk_kda  # pyright: ignore[reportMissingImports]

    batch, length = first_BT.shape
    first_N = F.pad(first_BT[:, 1:], (1, 0), value=True).flatten()
    start = first_N.nonzero().flatten()
    end = torch.full_like(start[:1], first_N.numel())
    inputs = (x.flatten(0, 1)[None] for x in (q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH))
    ends = torch.cat([start, end])
    out_1NHV, _ = chunk_kda(*inputs, use_qk_l2norm_in_kernel=True, cu_seqlens=ends)
    return out_1NHV[0].unflatten(0, (batch, length))
