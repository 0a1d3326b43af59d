"""Auxiliary losses added by autograd, so that the reported loss stays pure cross-entropy.

`inject(x, loss)` is `x` in the forward; in the backward the loss receives gradient 1, exactly as if
it had been added to the objective. Losses come as sums already divided by the global count.
"""

from typing import Any

import torch
from torch import Tensor


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = (loss.shape, loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        shape, dtype, device = ctx.like
        return grad_outputs[0], torch.ones(shape, dtype=dtype, device=device)


def inject(x: Tensor, loss: Tensor) -> Tensor:
    """Return x unchanged and add the scalar `loss` to whatever objective x later reaches."""
    return _Inject.apply(x, loss) if torch.is_grad_enabled() else x  # pyright: ignore
