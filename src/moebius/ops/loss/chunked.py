"""Head and cross-entropy in chunks of tokens: loss and gradients in one pass, on any device.

At most `chunk x V` logits exist at a time, in one buffer of at least fp32 that becomes p - onehot
in place. The head's gradient accumulates in at least fp32. Letters: N tokens, C of a chunk, D
width, V vocabulary.
"""

from functools import partial

import torch
from torch import Tensor

from moebius.ops.linear import at_least_fp32
from moebius.ops.loss.unit import Unit, differentiable

# Tokens whose logits exist at a time.
CHUNK = 1024


def head_cross_entropy_chunked(
    h_ND: Tensor, w_VD: Tensor, target_N: Tensor, valid_N: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Sum over valid tokens of the negative log-likelihood, in nats, as a scalar of at least fp32.

    Its gradients are first-order only: the backward multiplies what the forward computed.
    """
    return differentiable(partial(_unit, chunk), h_ND, w_VD, target_N, valid_N)


def _unit(
    chunk: int,
    h_ND: Tensor,
    w_VD: Tensor,
    target_N: Tensor,
    valid_N: Tensor,
    of_h: bool,
    of_w: bool,
) -> Unit:
    wide = at_least_fp32(h_ND.dtype)
    w_cast_VD = w_VD.to(h_ND.dtype)
    grad_h_ND = torch.empty_like(h_ND) if of_h else None
    grad_w_VD = w_VD.new_zeros(w_VD.shape, dtype=wide) if of_w else None
    total = torch.zeros((), dtype=wide, device=h_ND.device)
    for start in range(0, h_ND.shape[0], chunk):
        rows = slice(start, start + chunk)
        h_CD, valid_C1, target_C1 = h_ND[rows], valid_N[rows, None], target_N[rows, None]
        logits_CV = (h_CD @ w_cast_VD.T).to(wide)
        log_sum_C1 = logits_CV.logsumexp(1, keepdim=True)
        total += torch.where(valid_C1, log_sum_C1 - logits_CV.gather(1, target_C1), 0).sum()
        if grad_h_ND is None and grad_w_VD is None:
            continue
        # exp(logit - infinity) is 0: a token that does not count has no gradient.
        log_sum_C1.masked_fill_(~valid_C1, torch.inf)
        grad_CV = logits_CV.sub_(log_sum_C1).exp_()
        grad_CV = grad_CV.scatter_add_(1, target_C1, -valid_C1.to(wide)).to(h_ND.dtype)
        if grad_h_ND is not None:
            torch.mm(grad_CV, w_cast_VD, out=grad_h_ND[rows])
        if grad_w_VD is not None:
            grad_w_VD += grad_CV.T @ h_CD
    return Unit(total, grad_h_ND, None if grad_w_VD is None else grad_w_VD.to(w_VD.dtype))
