"""Cross-entropy of a linear head, without ever holding the N x V logits.

`naive` is the truth; `chunked` computes loss and gradients in one pass over chunks of tokens, on
any device; `native` does so in a kernel for bf16 on the CPU, tile by tile. Where ranks share the
vocabulary, `spread` does what `chunked` does.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moebius.ops.loss.chunked import head_cross_entropy_chunked
from moebius.ops.loss.naive import head_cross_entropy_naive
from moebius.ops.loss.native import WIDTH, head_cross_entropy_native
from moebius.ops.loss.spread import head_cross_entropy_spread
from moebius.ops.native import missing
from moebius.ops.ranks import Group

LossOp = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

BACKENDS: dict[str, LossOp] = {
    "naive": head_cross_entropy_naive,
    "chunked": head_cross_entropy_chunked,
    "native": head_cross_entropy_native,
}


def choose(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """The backend in use for hidden states of this width, by name."""
    fits = device.type == "cpu" and dtype == torch.bfloat16 and width % WIDTH == 0
    return "native" if fits and missing() is None else "chunked"


def head_cross_entropy(
    h_ND: Tensor, w_VD: Tensor, target_N: Tensor, valid_N: Tensor, group: Group = None
) -> Tensor:
    """Sum over valid tokens of the negative log-likelihood, in nats, as a scalar of at least fp32.

    Shapes: h_ND, w_VD (any dtype; its gradient has the same), target_N (int64), valid_N (bool).
    Each rank of the group gives an equal part of the vocabulary's rows, in order, and the same
    tokens. Gradients are first-order only: they are computed with the value, and scaled later.
    """
    if group is not None:
        return head_cross_entropy_spread(h_ND, w_VD, target_N, valid_N, group)
    op = BACKENDS[choose(h_ND.device, h_ND.dtype, h_ND.shape[-1])]
    return op(h_ND, w_VD, target_N, valid_N)
