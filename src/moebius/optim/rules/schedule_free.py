"""Schedule-Free AdamW (Defazio et al. 2024, arXiv 2405.15682): an average in place of a schedule.

Gradients are taken at y = (1 - beta1) z + beta1 x; AdamW moves z, and x averages z, weighted by the
squared peak of the rate so far. The weights are y in training and x wherever they are used
(`to_evaluation`). x is kept, not derived from y and z, so that y comes back to the last bit: a
weight has three states, one more than with AdamW. Take a constant schedule with a warm-up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.optim.rules import Rule, Slot, State, check_betas, check_eps, state_dtype


@dataclass(frozen=True)
class ScheduleFree(Rule):
    """`power` above 0 weights late steps more: by step^power."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-16
    power: float = 0.0

    def __post_init__(self) -> None:
        check_betas({"beta1": self.beta1, "beta2": self.beta2})
        check_eps(self.eps)

    def init(self, slots: Sequence[Slot], params: Sequence[Tensor]) -> list[State]:
        return [
            {
                "base": param.clone(),
                "average": param.clone(),
                "second_moment": torch.zeros_like(param),
                # Plain numbers, kept where reading them does not wait for an accelerator.
                "peak_lr": torch.zeros((), dtype=state_dtype(param)),
                "weight_sum": torch.zeros((), dtype=state_dtype(param)),
            }
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
        for param, grad, state in zip(params, grads, states, strict=True):
            base, average, second = state["base"], state["average"], state["second_moment"]
            grad = grad.to(base.dtype)
            second.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
            size = (second / (1 - self.beta2**step)).sqrt_().add_(self.eps)
            base.sub_(param, alpha=lr * weight_decay).addcdiv_(grad, size, value=-lr)
            average.lerp_(base, self._share(state, lr, step))
            self._mix(param, state)

    def _share(self, state: State, lr: float, step: int) -> float:
        """The weight of this step in the average of all up to it."""
        peak, total = state["peak_lr"], state["weight_sum"]
        peak.clamp_(min=lr)
        weight = step**self.power * peak.item() ** 2
        total.add_(weight)
        return weight / total.item() if weight else 0.0

    def _mix(self, param: Tensor, state: State) -> None:
        torch.lerp(state["average"], state["base"], 1 - self.beta1, out=param)

    @torch.no_grad()
    def to_evaluation(self, params: Sequence[Tensor], states: Sequence[State]) -> None:
        for param, state in zip(params, states, strict=True):
            param.copy_(state["average"])

    @torch.no_grad()
    def to_training(self, params: Sequence[Tensor], states: Sequence[State]) -> None:
        """ValueError for a weight that is not its average: something else has changed it."""
        for param, state in zip(params, states, strict=True):
            if not torch.equal(param, state["average"]):
                raise ValueError(
                    "a weight is not the average that schedule_free keeps of it; go on from a "
                    "checkpoint of the same rules, or import the weights into a new run"
                )
            self._mix(param, state)
