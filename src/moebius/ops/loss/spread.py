"""Head and cross-entropy where each rank of a group holds an equal part of the vocabulary.

In the chunks of `chunked`, after Megatron-LM (arXiv 1909.08053, 3): ranks tell each other only the
largest logit of a token, its sum of exponentials and its target's logit, never the logits. Letters:
N tokens, C of a chunk, D width, V the words of this rank.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.ops.linear import at_least_fp32
from moebius.ops.loss.chunked import in_chunks
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
    # Targets are counted from the first word of this rank.
    own_N = target_N - group.rank() * len(w_VD)
    loss = in_chunks(partial(_softmax, group), h_ND, w_VD, own_N, valid_N, chunk)
    return copied(loss, group)


def _softmax(
    group: dist.ProcessGroup, logits_CV: Tensor, own_C1: Tensor, learning: bool
) -> tuple[Tensor, Tensor | None]:
    here_C1 = (own_C1 >= 0) & (own_C1 < logits_CV.shape[1])
    index_C1 = torch.where(here_C1, own_C1, 0)
    logits_CV = logits_CV.to(at_least_fp32(logits_CV.dtype))
    most_C1 = logits_CV.amax(1, keepdim=True)
    dist.all_reduce(most_C1, dist.ReduceOp.MAX, group)
    logits_CV = logits_CV - most_C1
    target_C1 = torch.where(here_C1, logits_CV.gather(1, index_C1), 0)
    exp_CV = logits_CV.exp_()
    told_C2 = torch.cat([exp_CV.sum(1, keepdim=True), target_C1], dim=1)
    dist.all_reduce(told_C2, group=group)
    sum_C1, target_C1 = told_C2.split(1, dim=1)
    nll_C1 = sum_C1.log() - target_C1
    if not learning:
        return nll_C1, None
    return nll_C1, exp_CV.div_(sum_C1).scatter_add_(1, index_C1, -here_C1.to(exp_CV.dtype))
