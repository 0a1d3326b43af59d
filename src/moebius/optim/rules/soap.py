"""SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in the eigenbases of Shampoo's preconditioners.

L <- b L + (1-b) G G^T and R <- b R + (1-b) G^T G; every few steps one power iteration and a QR turn
their eigenbases, in which Adam's second moment is kept. Experts and blocks are matrices of their
own, all turned together. M matrices in a stack, R rows, C columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moebius.optim.rules import (
    Rule,
    Slot,
    State,
    check_betas,
    check_eps,
    decay_,
    matrix_shape,
    state_dtype,
)


@dataclass(frozen=True)
class SOAP(Rule):
    """SOAP for weights [out, in] and [E, out, in], each divided into its slot's blocks.

    As published, the first step only measures, and bases turn every `frequency` steps after it. A
    dimension above `max_precondition_dim` keeps its own basis. eps is not as small as Adam's: where
    a gradient lacks full rank, all that is left of its second moment in the new basis is rounding.
    """

    MATRICES: ClassVar[bool] = True

    beta1: float = 0.95
    beta2: float = 0.95
    shampoo_beta: float = 0.95
    eps: float = 1e-8
    frequency: int = 10
    max_precondition_dim: int = 10_000
    cautious: bool = False

    def __post_init__(self) -> None:
        check_betas({"beta1": self.beta1, "beta2": self.beta2, "shampoo_beta": self.shampoo_beta})
        check_eps(self.eps)
        for name in ("frequency", "max_precondition_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def init(self, slots: Sequence[Slot], params: Sequence[Tensor]) -> list[State]:
        states: list[State] = []
        for slot, param in zip(slots, params, strict=True):
            num, *sizes = matrix_shape("soap", slot, param)
            dtype = state_dtype(param)
            state = {
                "momentum": torch.zeros_like(param, dtype=dtype),
                "second_moment": torch.zeros_like(param, dtype=dtype),
                # On the CPU: reading it does not wait for an accelerator.
                "updates": torch.zeros((), dtype=dtype),
            }
            # A row for each of the weight's rows, so that ranks may hold some experts each.
            stack = (num,) if param.ndim < 3 else (len(param), slot.blocks)
            for side, size in zip(("left", "right"), sizes, strict=True):
                if size <= self.max_precondition_dim:
                    square = param.new_zeros((*stack, size, size), dtype=dtype)
                    state |= {side: square, f"{side}_basis": square.clone()}
            states.append(state)
        return states

    @torch.no_grad()
    def update(
        self,
        slots: Sequence[Slot],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        *,
        lr: float,
        weight_decay: float,
        step: int,
        total_steps: int,
    ) -> None:
        for slot, param, grad, state in zip(slots, params, grads, states, strict=True):
            shape = matrix_shape("soap", slot, param)
            grad_MRC = grad.to(state["momentum"].dtype).reshape(shape)
            sides = {
                key: square.view(-1, *square.shape[-2:])
                for key, square in state.items()
                if key.startswith(("left", "right"))
            }
            state = {**state, **sides}
            # Not `step`: the first gradients may have been skipped.
            done = int(state["updates"].item())
            if done:
                update_MRC = self._direction(grad_MRC, state, done)
                decay_(param.view(shape), update_MRC, lr * weight_decay, self.cautious)
                param.view(shape).add_(update_MRC, alpha=-lr)
            self._measure(grad_MRC, state, done)
            state["updates"].add_(1)

    def _direction(self, grad_MRC: Tensor, state: State, step: int) -> Tensor:
        """Adam's update in the bases, turned back."""
        momentum_MRC = state["momentum"].view(grad_MRC.shape)
        second_MRC = state["second_moment"].view(grad_MRC.shape)
        momentum_MRC.lerp_(grad_MRC, 1 - self.beta1)
        turned_MRC = _turn(grad_MRC, state)
        second_MRC.mul_(self.beta2).addcmul_(turned_MRC, turned_MRC, value=1 - self.beta2)
        size_MRC = second_MRC.sqrt().add_(self.eps)
        update_MRC = _turn(momentum_MRC, state).div_(size_MRC)
        correction = math.sqrt(1 - self.beta2**step) / (1 - self.beta1**step)
        return _turn(update_MRC, state, back=True).mul_(correction)

    def _measure(self, grad_MRC: Tensor, state: State, step: int) -> None:
        """Move the preconditioners, and their bases where it is time."""
        for dim, side in ((-2, "left"), (-1, "right")):
            if side not in state:
                continue
            gram, basis = state[side], state[f"{side}_basis"]
            other = grad_MRC.mT
            product = grad_MRC @ other if side == "left" else other @ grad_MRC
            gram.lerp_(product, 1 - self.shampoo_beta)
            if step == 0:
                basis.copy_(torch.linalg.eigh(gram).eigenvectors.flip(-1))
            elif step % self.frequency == 0:
                _refresh(gram, basis, state["second_moment"].view(grad_MRC.shape), dim)


def _turn(x_MRC: Tensor, state: State, back: bool = False) -> Tensor:
    """Into the bases, left^T x right, or back out of them; always a new tensor."""
    left, right = state.get("left_basis"), state.get("right_basis")
    y_MRC = x_MRC.clone() if left is None else (left if back else left.mT) @ x_MRC
    return y_MRC if right is None else y_MRC @ (right.mT if back else right)


def _refresh(gram: Tensor, basis: Tensor, second_MRC: Tensor, dim: int) -> None:
    """One power iteration from the old basis, largest first; second moments follow their axes."""
    image = gram @ basis
    order = (basis * image).sum(-2).argsort(dim=-1, descending=True, stable=True)
    columns = order[:, None, :].expand_as(basis)
    basis.copy_(torch.linalg.qr(image.gather(-1, columns)).Q)
    places = order[:, :, None] if dim == -2 else order[:, None, :]
    second_MRC.copy_(second_MRC.gather(dim, places.expand_as(second_MRC)))
