"""Head and cross-entropy in chunks of tokens: loss and gradients in one pass, on any device.

At most `chunk x V` logits exist at a time; their log-probabilities, in at least fp32, become
p - onehot in place. The head's gradient accumulates in at least fp32. Letters: N tokens, C of a
chunk, D width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moebius.ops.linear import at_least_fp32
from moebius.ops.loss.unit import Unit, differentiable

# Of logits_CV and target_C1: nll_C1 and, where it is asked for, its gradient by logits, in place of
# what it was computed from.
Softmax = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]

# Tokens whose logits exist at a time; on a CPU as few as stay in its caches.
CHUNK = 1024
CHUNK_CPU = 256


def head_cross_entropy_chunked(
    h_ND: Tensor, w_VD: Tensor, target_N: Tensor, valid_N: Tensor, chunk: int | None = None
) -> Tensor:
    """Sum over valid tokens of the negative log-likelihood, in nats, as a scalar of at least fp32.

    Its gradients are first-order only: the backward multiplies what the forward computed.
    """
    return in_chunks(_softmax, h_ND, w_VD, target_N, valid_N, chunk)


def in_chunks(
    softmax: Softmax,
    h_ND: Tensor,
    w_VD: Tensor,
    target_N: Tensor,
    valid_N: Tensor,
    chunk: int | None,
) -> Tensor:
    """The same with any way from logits to losses."""
    size = chunk or (CHUNK_CPU if h_ND.device.type == "cpu" else CHUNK)
    return differentiable(partial(_unit, softmax, size), h_ND, w_VD, target_N, valid_N)


def _unit(
    softmax: Softmax,
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
        nll_C1, grad_CV = softmax(h_CD @ w_cast_VD.T, target_C1, of_h or of_w)
        total += torch.where(valid_C1, nll_C1, 0).sum()
        if grad_CV is None:
            continue
        grad_CV = grad_CV.to(h_ND.dtype)
        # Tokens that do not count are taken out of the narrow operands, not of all V columns.
        if grad_h_ND is not None:
            torch.mm(grad_CV, w_cast_VD, out=grad_h_ND[rows]).masked_fill_(~valid_C1, 0)
        if grad_w_VD is not None:
            grad_w_VD += grad_CV.T @ h_CD.masked_fill(~valid_C1, 0)
    return Unit(total, grad_h_ND, None if grad_w_VD is None else grad_w_VD.to(w_VD.dtype))


def _softmax(logits_CV: Tensor, target_C1: Tensor, learning: bool) -> tuple[Tensor, Tensor | None]:
    log_p_CV = torch.log_softmax(logits_CV, dim=-1, dtype=at_least_fp32(logits_CV.dtype))
    nll_C1 = -log_p_CV.gather(1, target_C1)
    if not learning:
        return nll_C1, None
    return nll_C1, log_p_CV.exp_().scatter_add_(1, target_C1, torch.full_like(nll_C1, -1))
