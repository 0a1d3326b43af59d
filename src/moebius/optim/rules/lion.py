"""Lion (Chen et al. 2023, arXiv 2302.06675): the sign of an interpolated momentum as the update.

Every element moves by the rate itself, so rates are a third to a tenth of AdamW's and weight decays
as many times larger. One state, half of Adam's memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.optim.rules import Rule, Slot, State, check_betas, decay_, state_dtype


@dataclass(frozen=True)
class Lion(Rule):
    beta1: float = 0.9
    beta2: float = 0.99
    cautious: bool = False

    def __post_init__(self) -> None:
        check_betas({"beta1": self.beta1, "beta2": self.beta2})

    def init(self, slots: Sequence[Slot], params: Sequence[Tensor]) -> list[State]:
        return [{"momentum": torch.zeros_like(param, dtype=state_dtype(param))} for param in params]

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
        for param, grad, state in zip(params, grads, states, strict=True):
            momentum = state["momentum"]
            grad = grad.to(momentum.dtype)
            update = momentum.lerp(grad, 1 - self.beta1).sign_()
            momentum.lerp_(grad, 1 - self.beta2)
            decay_(param, update, lr * weight_decay, self.cautious)
            param.add_(update, alpha=-lr)
