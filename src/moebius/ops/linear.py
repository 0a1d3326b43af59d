"""The elementwise-precision rule of the house: weights follow the dtype of the activations.

Master weights may be fp32 while activations are bf16; the cast is part of the graph, so gradients
arrive in the dtype of the master weights. A weight that carries a `Product` is multiplied in its
low-precision format (`ops/formats`). Letters: docs/letters.md.
"""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.ops.formats import Product, Watch, multiply


class Operand(nn.Parameter):
    """A parameter that says in which format its products are; without one, in that of the input."""

    product: Product | None = None

    def mark(self, gathered: nn.Parameter) -> None:
        """Let another tensor of the same weight, such as FSDP gathers, be multiplied as this is."""
        gathered.__class__ = type(self)
        vars(gathered).update(vars(self))

    @abstractmethod
    def watch(self) -> Watch | None:
        """Who is to be shown what rounding does to its products; None if nobody looks."""


def linear(x: Tensor, w_OI: Tensor, b_O: Tensor | None = None) -> Tensor:
    """`x @ w_OI.T + b_O` in the dtype of x: [..., I] -> [..., O]."""
    b_O = None if b_O is None else b_O.to(x.dtype)
    if isinstance(w_OI, Operand) and w_OI.product is not None:
        y = multiply(x, w_OI, w_OI.product, w_OI.watch())
        return y if b_O is None else y + b_O
    return F.linear(x, w_OI.to(x.dtype), b_O)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precisions, the dtype itself otherwise (fp64 is never forced down)."""
    return torch.promote_types(dtype, torch.float32)
