"""Autograd for a loss whose gradients are computed together with its value.

The forward already computes the gradients of a unit loss, so the backward only scales them. These
gradients are first-order only. Letters: N tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Unit(NamedTuple):
    """A loss (a scalar of at least fp32), and the gradients that were asked for."""

    total: Tensor
    grad_h_ND: Tensor | None
    grad_w_VD: Tensor | None


# Of h_ND, w_VD, target_N, valid_N, and whether the gradients of h and w are wanted.
UnitLoss = Callable[[Tensor, Tensor, Tensor, Tensor, bool, bool], Unit]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: UnitLoss, h_ND: Tensor, w_VD: Tensor, target_N: Tensor, valid_N: Tensor
    ) -> Tensor:
        _, of_h, of_w, _, _ = ctx.needs_input_grad
        unit = loss(h_ND, w_VD, target_N, valid_N, of_h, of_w)
        ctx.save_for_backward(unit.grad_h_ND, unit.grad_w_VD)
        return unit.total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        # The scale has no dimension, so it is not rounded to the dtype of what it multiplies.
        scale = grad_outputs[0]
        grads = (None if grad is None else grad * scale for grad in ctx.saved_tensors)
        return None, *grads, None, None


def differentiable(
    loss: UnitLoss, h_ND: Tensor, w_VD: Tensor, target_N: Tensor, valid_N: Tensor
) -> Tensor:
    """The value of a loss, with its gradients where they are needed."""
    if not torch.is_grad_enabled():
        return loss(h_ND, w_VD, target_N, valid_N, False, False).total
    return _Differentiable.apply(loss, h_ND, w_VD, target_N, valid_N)  # pyright: ignore
