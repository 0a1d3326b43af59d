"""Head and cross-entropy in chunks of tokens: loss and gradients in one pass.

The forward already computes the gradients of a unit loss, so the backward only scales them, and at
most `chunk x V` logits exist at a time. The head's gradient accumulates in at least fp32.
Letters: N tokens, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from moebius.ops.linear import at_least_fp32

# Tokens whose logits exist at a time.
CHUNK = 1024


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, w_VD: Tensor, target_N: Tensor, valid_N: Tensor, chunk: int
    ) -> Tensor:
        wide = at_least_fp32(h_ND.dtype)
        w_cast_VD = w_VD.to(h_ND.dtype)
        grad_h_ND = torch.empty_like(h_ND)
        grad_w_VD = torch.zeros(w_VD.shape, dtype=wide, device=w_VD.device)
        total = torch.zeros((), dtype=wide, device=h_ND.device)
        for start in range(0, h_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            h_CD, valid_C1 = h_ND[rows], valid_N[rows, None]
            log_p_CV = torch.log_softmax((h_CD @ w_cast_VD.T).to(wide), dim=-1)
            target_C1 = target_N[rows, None]
            nll_C1 = -log_p_CV.gather(1, target_C1)
            total += torch.where(valid_C1, nll_C1, 0).sum()
            grad_CV = log_p_CV.exp_()
            grad_CV.scatter_add_(1, target_C1, torch.full_like(nll_C1, -1.0))
            grad_CV = (grad_CV * valid_C1).to(h_ND.dtype)
            torch.mm(grad_CV, w_cast_VD, out=grad_h_ND[rows])
            grad_w_VD += grad_CV.T @ h_CD
        ctx.save_for_backward(grad_h_ND, grad_w_VD.to(w_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_h_ND, grad_w_VD = ctx.saved_tensors
        scale = grad_outputs[0]
        return grad_h_ND * scale.to(grad_h_ND.dtype), grad_w_VD * scale, None, None, None


@torch.no_grad()
def _sum_only(h_ND: Tensor, w_VD: Tensor, target_N: Tensor, valid_N: Tensor, chunk: int) -> Tensor:
    wide = at_least_fp32(h_ND.dtype)
    w_cast_VD = w_VD.to(h_ND.dtype)
    total = torch.zeros((), dtype=wide, device=h_ND.device)
    for start in range(0, h_ND.shape[0], chunk):
        rows = slice(start, start + chunk)
        logits_CV = (h_ND[rows] @ w_cast_VD.T).to(wide)
        nll_C = logits_CV.logsumexp(1) - logits_CV.gather(1, target_N[rows, None])[:, 0]
        total += torch.where(valid_N[rows], nll_C, 0).sum()
    return total


def head_cross_entropy(
    h_ND: Tensor, w_VD: Tensor, target_N: Tensor, valid_N: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Sum over valid tokens of the negative log-likelihood, in nats, as a scalar of at least fp32.

    Its gradients are first-order only: the backward multiplies what the forward computed.
    """
    if not torch.is_grad_enabled():
        return _sum_only(h_ND, w_VD, target_N, valid_N, chunk)
    return _HeadCrossEntropy.apply(h_ND, w_VD, target_N, valid_N, chunk)  # pyright: ignore
