"""AdEMAMix (Pagliardini et al. 2024, arXiv 2409.03137): Adam with a second, very slow momentum.

The update is (m1 / (1 - beta1^t) + alpha m2) / (sqrt(nu / (1 - beta2^t)) + eps): only the fast
momentum and the second moment are corrected for their bias. alpha rises linearly, beta3 from beta1
such that its half-life does, because a slow average of early gradients would diverge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.optim.rules import Rule, Slot, State, check_betas, check_eps, decay_, state_dtype


@dataclass(frozen=True)
class AdEMAMix(Rule):
    """`warmup` is the share of the run over which alpha and beta3 rise; 0 switches that off."""

    beta1: float = 0.9
    beta2: float = 0.999
    beta3: float = 0.9999
    alpha: float = 5.0
    warmup: float = 1.0
    eps: float = 1e-16
    cautious: bool = False

    def __post_init__(self) -> None:
        check_betas({"beta1": self.beta1, "beta2": self.beta2, "beta3": self.beta3})
        check_eps(self.eps)
        if not 0 < self.beta1 <= self.beta3:
            raise ValueError(
                f"beta1={self.beta1} must lie above 0 and not above beta3={self.beta3}"
            )
        if self.alpha < 0 or self.warmup < 0:
            raise ValueError(f"alpha={self.alpha}, warmup={self.warmup} must not be negative")

    def init(self, slots: Sequence[Slot], params: Sequence[Tensor]) -> list[State]:
        names = ("first_moment", "slow_moment", "second_moment")
        return [
            {name: torch.zeros_like(param, dtype=state_dtype(param)) for name in names}
            for param in params
        ]

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
        alpha, beta3 = self.settings(step, total_steps)
        for param, grad, state in zip(params, grads, states, strict=True):
            first, slow, second = state.values()
            grad = grad.to(first.dtype)
            first.lerp_(grad, 1 - self.beta1)
            slow.lerp_(grad, 1 - beta3)
            second.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
            size = (second / (1 - self.beta2**step)).sqrt_().add_(self.eps)
            update = (first / (1 - self.beta1**step)).add_(slow, alpha=alpha).div_(size)
            decay_(param, update, lr * weight_decay, self.cautious)
            param.add_(update, alpha=-lr)

    def settings(self, step: int, total_steps: int) -> tuple[float, float]:
        """alpha and beta3 at `step`, counted from 1."""
        rising = self.warmup * total_steps
        if step >= rising:
            return self.alpha, self.beta3
        share = step / rising
        low, high = math.log(self.beta1), math.log(self.beta3)
        return self.alpha * share, math.exp(low * high / ((1 - share) * high + share * low))
