"""Head and cross-entropy where each rank of a group holds an equal part of the vocabulary.

As `chunked`, after Megatron-LM (arXiv 1909.08053, 3): ranks tell each other only the largest logit
of a token, its sum of exponentials and its target's logit, never the logits. Letters: N tokens, C
of a chunk, D width, V the words of this rank.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.ops.linear import at_least_fp32
from moebius.ops.loss.chunked import CHUNK, CHUNK_CPU
from moebius.ops.loss.unit import Unit, differentiable
from moebius.ops.ranks import copied


def head_cross_entropy_spread(
    h_ND: Tensor,
    w_VD: Tensor,
    target_N: Tensor,
    valid_N: Tensor,
    group: dist.ProcessGroup,
    chunk: int | None = None,
) -> Tensor:
    """Sum over valid tokens of the negative log-likelihood, in nats, the same on every rank.

    Every rank's objective counts: the gradient of its words is the whole one, and that of the
    hidden states its share. First-order only.
    """
    size = chunk or (CHUNK_CPU if h_ND.device.type == "cpu" else CHUNK)
    own_N = target_N - group.rank() * len(w_VD)
    loss = differentiable(partial(_unit, group, size), h_ND, w_VD, own_N, valid_N)
    return copied(loss, group)


def _unit(
    group: dist.ProcessGroup,
    chunk: int,
    h_ND: Tensor,
    w_VD: Tensor,
    own_N: Tensor,
    valid_N: Tensor,
    of_h: bool,
    of_w: bool,
) -> Unit:
    """`own_N` are targets counted from the first word of this rank."""
    wide = at_least_fp32(h_ND.dtype)
    w_cast_VD = w_VD.to(h_ND.dtype)
    grad_h_ND = torch.empty_like(h_ND) if of_h else None
    grad_w_VD = w_VD.new_zeros(w_VD.shape, dtype=wide) if of_w else None
    total = torch.zeros((), dtype=wide, device=h_ND.device)
    for start in range(0, h_ND.shape[0], chunk):
        rows = slice(start, start + chunk)
        h_CD, valid_C1, own_C1 = h_ND[rows], valid_N[rows, None], own_N[rows, None]
        here_C1 = (own_C1 >= 0) & (own_C1 < len(w_VD))
        index_C1 = torch.where(here_C1, own_C1, 0)
        logits_CV = (h_CD @ w_cast_VD.T).to(wide)
        most_C1 = logits_CV.amax(1, keepdim=True)
        dist.all_reduce(most_C1, dist.ReduceOp.MAX, group)
        logits_CV -= most_C1
        target_C1 = torch.where(here_C1, logits_CV.gather(1, index_C1), 0)
        exp_CV = logits_CV.exp_()
        told_C2 = torch.cat([exp_CV.sum(1, keepdim=True), target_C1], dim=1)
        dist.all_reduce(told_C2, group=group)
        sum_C1, target_C1 = told_C2.split(1, dim=1)
        total += torch.where(valid_C1, sum_C1.log() - target_C1, 0).sum()
        if not (of_h or of_w):
            continue
        grad_CV = exp_CV.div_(sum_C1).scatter_add_(1, index_C1, -here_C1.to(wide))
        grad_CV = grad_CV.to(h_ND.dtype)
        if grad_h_ND is not None:
            torch.mm(grad_CV, w_cast_VD, out=grad_h_ND[rows]).masked_fill_(~valid_C1, 0)
        if grad_w_VD is not None:
            grad_w_VD += grad_CV.T @ h_CD.masked_fill(~valid_C1, 0)
    return Unit(total, grad_h_ND, None if grad_w_VD is None else grad_w_VD.to(w_VD.dtype))
