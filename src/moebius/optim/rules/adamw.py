"""AdamW (Loshchilov and Hutter 2019): Adam with weight decay apart from the gradient.

The default eps of 1e-16 follows LongCat-Flash (3.1.3): the loss suffers as soon as eps comes near
the RMS of a weight's gradient, which shrinks with model size and batch, so 1e-8 is not safe.
The arithmetic is torch's fused kernel: one pass over memory, element by element, deterministic.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from moebius.optim.rules import Rule, Slot, State, state_dtype


@dataclass(frozen=True)
class AdamW(Rule):
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-16

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1={self.beta1} and beta2={self.beta2} must lie in [0, 1)")
        if self.eps <= 0:
            raise ValueError(f"eps={self.eps} must be above 0")

    def init(self, slots: Sequence[Slot], params: Sequence[Tensor]) -> list[State]:
        return [
            {
                "first_moment": torch.zeros_like(param, dtype=state_dtype(param)),
                "second_moment": torch.zeros_like(param, dtype=state_dtype(param)),
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
    ) -> None:
        pairs = zip(params, grads, strict=True)
        adamw(
            list(params),
            # The kernel walks raw memory: a gradient must have the dtype and layout of its weight.
            [grad.to(param.dtype).contiguous() for param, grad in pairs],
            [state["first_moment"] for state in states],
            [state["second_moment"] for state in states],
            [],
            # The kernel counts up before it corrects the bias.
            [torch.tensor(step - 1.0, device=param.device) for param in params],
            fused=True,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )
