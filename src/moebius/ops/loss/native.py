"""Head and cross-entropy in one native kernel, for bf16 on CPUs that have it (`ops/native`).

The kernel holds the logits of 64 tokens a thread in fp32, and p - onehot of a chunk in bf16; only
valid tokens cost time. Letters: N tokens, M the valid ones, D width, V vocabulary.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from moebius.ops import native
from moebius.ops.loss.unit import Unit, differentiable

SOURCE = Path(__file__).with_name("native.cpp")
# Widths are a multiple of this.
WIDTH = 32


def head_cross_entropy_native(
    h_ND: Tensor, w_VD: Tensor, target_N: Tensor, valid_N: Tensor
) -> Tensor:
    """Sum over valid tokens of the negative log-likelihood, in nats, in fp32; h_ND in bf16."""
    return differentiable(_unit, h_ND, w_VD, target_N, valid_N)


def _unit(
    h_ND: Tensor, w_VD: Tensor, target_N: Tensor, valid_N: Tensor, of_h: bool, of_w: bool
) -> Unit:
    if h_ND.dtype != torch.bfloat16 or h_ND.shape[1] % WIDTH:
        raise ValueError(f"the native loss takes bf16 of a width that is a multiple of {WIDTH}")
    index_M = valid_N.nonzero()[:, 0]
    target_M = target_N[index_M]
    if len(index_M) and (int(target_M.min()) < 0 or int(target_M.max()) >= len(w_VD)):
        raise ValueError(f"targets of valid tokens must be 0 to {len(w_VD) - 1}")
    h_ND, target_N = h_ND.contiguous(), target_N.long().contiguous()
    w_wide_VD = w_VD.float().contiguous()
    # The kernel writes the rows of valid tokens, and the head's gradient if there is any.
    grad_h_ND = torch.zeros_like(h_ND) if of_h else None
    grad_w_VD = torch.empty_like(w_wide_VD) if of_w else None
    if grad_w_VD is not None and not len(index_M):
        grad_w_VD.zero_()
    function = native.library(SOURCE).head_cross_entropy
    function.restype = ctypes.c_double
    total = function(
        *map(native.address, (h_ND, w_wide_VD, target_N, index_M)),
        *map(native.integer, (len(index_M), h_ND.shape[1], len(w_VD))),
        native.address(grad_h_ND),
        native.address(grad_w_VD),
        native.threads(),
    )
    if grad_w_VD is not None:
        grad_w_VD = grad_w_VD.to(w_VD.dtype)
    return Unit(torch.tensor(total, dtype=torch.float32), grad_h_ND, grad_w_VD)
