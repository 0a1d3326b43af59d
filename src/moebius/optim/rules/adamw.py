"""AdamW (Loshchilov and Hutter 2019): Adam with weight decay apart from the gradient.

The default eps of 1e-16 follows LongCat-Flash (3.1.3): the loss suffers as soon as eps comes near
the RMS of a weight's gradient, which shrinks with model size and batch, so 1e-8 is not safe.
With fp32 moments the arithmetic is torch's fused kernel: one pass over memory, deterministic. With
bf16 moments it is fp32 all the same; only what is kept is rounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from moebius.optim.rounding import split, stochastic
from moebius.optim.rules import Rule, Slot, State, check_betas, check_eps, decay_, state_dtype

MOMENTS = ("first_moment", "second_moment")


@dataclass(frozen=True)
class AdamW(Rule):
    """`state_dtype` is what moments are kept in; those of fp64 weights are fp64 always.

    `rounding` of bf16 moments: nearest; stochastic, with bits that depend on the weight's name and
    the step alone; kahan, whose remainders take as much memory again, fp32's in all.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-16
    cautious: bool = False
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    rounding: Literal["nearest", "stochastic", "kahan"] = "nearest"

    def __post_init__(self) -> None:
        check_betas({"beta1": self.beta1, "beta2": self.beta2})
        check_eps(self.eps)
        if self.rounding != "nearest" and self.state_dtype == "fp32":
            raise ValueError(
                f"rounding={self.rounding} is for state_dtype=bf16; fp32 is not rounded"
            )

    def init(self, slots: Sequence[Slot], params: Sequence[Tensor]) -> list[State]:
        return [
            {name: torch.zeros_like(param, dtype=self._kept(param)) for name in self._names(param)}
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
        whole: list[tuple[Tensor, Tensor, State]] = []
        for slot, param, grad, state in zip(slots, params, grads, states, strict=True):
            # The kernel walks raw memory: a gradient must have the dtype and layout of its weight.
            grad = grad.to(param.dtype).contiguous()
            if self.cautious:
                ahead = state["first_moment"].to(grad.dtype).lerp(grad, 1 - self.beta1)
                decay_(param, ahead, lr * weight_decay, cautious=True)
            if self._kept(param) == torch.bfloat16:
                self._rounded(slot, param, grad, state, lr, weight_decay, step)
            else:
                whole.append((param, grad, state))
        if whole:
            self._fused(whole, lr, weight_decay, step)

    def _fused(
        self, rows: Sequence[tuple[Tensor, Tensor, State]], lr: float, decay: float, step: int
    ) -> None:
        adamw(
            [param for param, _, _ in rows],
            [grad for _, grad, _ in rows],
            [state["first_moment"] for _, _, state in rows],
            [state["second_moment"] for _, _, state in rows],
            [],
            # The kernel counts up before it corrects the bias.
            [torch.tensor(step - 1.0, device=param.device) for param, _, _ in rows],
            fused=True,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=lr,
            weight_decay=0.0 if self.cautious else decay,
            eps=self.eps,
            maximize=False,
        )

    def _rounded(
        self,
        slot: Slot,
        param: Tensor,
        grad: Tensor,
        state: State,
        lr: float,
        decay: float,
        step: int,
    ) -> None:
        first, second = (self._read(state, name) for name in MOMENTS)
        first.lerp_(grad, 1 - self.beta1)
        second.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        if not self.cautious:
            decay_(param, first, lr * decay, cautious=False)
        size = (second / (1 - self.beta2**step)).sqrt_().add_(self.eps)
        param.addcdiv_(first, size, value=-lr / (1 - self.beta1**step))
        for name, moment in zip(MOMENTS, (first, second), strict=True):
            self._write(state, name, moment, f"{slot.name}.{name} {step}")

    def _read(self, state: State, name: str) -> Tensor:
        moment = state[name].float()
        return moment.add_(state[f"{name}_lost"]) if self.rounding == "kahan" else moment

    def _write(self, state: State, name: str, moment: Tensor, key: str) -> None:
        if self.rounding == "kahan":
            high, lost = split(moment)
            state[name].copy_(high)
            state[f"{name}_lost"].copy_(lost)
        elif self.rounding == "stochastic":
            state[name].copy_(stochastic(moment, key))
        else:
            state[name].copy_(moment)

    def _kept(self, param: Tensor) -> torch.dtype:
        bf16 = self.state_dtype == "bf16" and param.dtype != torch.float64
        return torch.bfloat16 if bf16 else state_dtype(param)

    def _names(self, param: Tensor) -> tuple[str, ...]:
        lost = self.rounding == "kahan" and self._kept(param) == torch.bfloat16
        return (*MOMENTS, *(f"{name}_lost" for name in MOMENTS)) if lost else MOMENTS
