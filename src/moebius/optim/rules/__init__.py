"""The contract of an optimizer rule: how a weight moves, given its gradient and its state.

A rule is a frozen config with two pure methods: `init` makes the state tensors of each weight and
`update` changes weights and states in place. It keeps nothing else: the step's number is passed in,
so a resumed run continues to the last bit. States are in fp32 or, for fp64 weights, in fp64.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moebius.config import Variant

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


@dataclass(frozen=True)
class Rule(Variant, ABC):
    """How weights move. Weights are fp32 or fp64 and contiguous; gradients any float dtype."""

    SEAM: ClassVar[str] = "optimizer rule"
    TABLE: ClassVar[Mapping[str, str]] = {
        "adamw": "moebius.optim.rules.adamw:AdamW",
        "muon": "moebius.optim.rules.muon:Muon",
    }

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
    ) -> None:
        """Move `params` and `states` in place, under no_grad. `step` counts updates from 1."""


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a weight's state: its own, promoted to fp32 at least."""
    return torch.promote_types(param.dtype, torch.float32)
