"""The contract of an optimizer rule: how a weight moves, given its gradient and its state.

A rule is a frozen config with two pure methods: `init` makes the state tensors of each weight and
`update` changes weights and states in place. It keeps nothing else: the step's number is passed in,
so a resumed run continues to the last bit. States are in fp32 (or as the config says) or, for fp64
weights, in fp64.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moebius.config import Variant
from moebius.ops.shard import Shard

State = dict[str, Tensor]


@dataclass(frozen=True)
class Slot:
    """What a rule may know of a weight: its name, its role, and how many matrices it holds.

    `blocks` counts the equal matrices that lie one above the other along dim -2 (2 for a fused
    gate_up [2F, D] or [E, 2F, D]); rules that treat a weight as a matrix treat each on its own.
    """

    name: str
    role: str
    blocks: int = 1
    # Which rows of the weight this rank holds; None: all of them.
    shard: Shard | None = None


@dataclass(frozen=True)
class Rule(Variant, ABC):
    """How weights move. Weights are fp32 or fp64 and contiguous; gradients any float dtype."""

    SEAM: ClassVar[str] = "optimizer rule"
    TABLE: ClassVar[Mapping[str, str]] = {
        "adamw": "moebius.optim.rules.adamw:AdamW",
        "ademamix": "moebius.optim.rules.ademamix:AdEMAMix",
        "lion": "moebius.optim.rules.lion:Lion",
        "muon": "moebius.optim.rules.muon:Muon",
        "schedule_free": "moebius.optim.rules.schedule_free:ScheduleFree",
        "soap": "moebius.optim.rules.soap:SOAP",
    }

    # Whether an update looks at whole matrices; else each element moves by its own gradient alone.
    MATRICES: ClassVar[bool] = False

    @abstractmethod
    def init(self, slots: Sequence[Slot], params: Sequence[Tensor]) -> list[State]:
        """Each weight's state before the first step; ValueError where a weight does not fit."""

    @abstractmethod
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
        """Move `params` and `states` in place, under no_grad.

        `step` counts from 1, those skipped for a bad gradient included; `total_steps` is the run's
        horizon, for rules whose own settings rise over the run.
        """

    def width_exponent(self) -> float:
        """e where the best rate of a hidden matrix goes as width^-e; see `optim/transfer.py`.

        1 for updates whose elements do not depend on width, as Adam's and all that are like signs.
        """
        return 1.0

    def to_evaluation(self, params: Sequence[Tensor], states: Sequence[State]) -> None:
        """Put in place the weights to evaluate, save and sample from, where they are others."""

    def to_training(self, params: Sequence[Tensor], states: Sequence[State]) -> None:
        """Put in place the weights that gradients are taken at; undoes `to_evaluation`."""


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a weight's state: its own, promoted to fp32 at least."""
    return torch.promote_types(param.dtype, torch.float32)


def check_betas(betas: Mapping[str, float]) -> None:
    """Refuse a decay rate of a moving average outside [0, 1)."""
    if not all(0 <= beta < 1 for beta in betas.values()):
        listed = ", ".join(f"{name}={beta}" for name, beta in betas.items())
        raise ValueError(f"{listed} must lie in [0, 1)")


def check_eps(eps: float) -> None:
    """Refuse an epsilon that cannot keep a division by zero away."""
    if eps <= 0:
        raise ValueError(f"eps={eps} must be above 0")


def matrix_shape(rule: str, slot: Slot, param: Tensor) -> tuple[int, int, int]:
    """(M, R, C) of a weight as a stack of matrices, a block each; ValueError where it is none."""
    if param.ndim not in (2, 3):
        shape = list(param.shape)
        raise ValueError(f"{rule} needs a matrix or a stack of them; {slot.name} is {shape}")
    rows, cols = param.shape[-2:]
    if slot.blocks < 1 or rows % slot.blocks:
        raise ValueError(f"{slot.name}: {rows} rows do not divide into {slot.blocks} blocks")
    stack = param.shape[0] if param.ndim == 3 else 1
    return stack * slot.blocks, rows // slot.blocks, cols


def decay_(weight: Tensor, update: Tensor, amount: float, cautious: bool) -> None:
    """Shrink a weight by the share `amount`, before it moves along -`update`.

    A cautious decay (arXiv 2510.12402) leaves elements alone that the update lets grow.
    """
    if not cautious:
        weight.mul_(1 - amount)
        return
    shrinks = (update * weight >= 0).to(weight.dtype)
    weight.mul_(shrinks.mul_(-amount).add_(1))
