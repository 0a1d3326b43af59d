"""The balance seam: what keeps experts evenly used. A rule is one file plus one line.

A rule may hold a selection bias that it moves after each step (a controller), or add a loss, or
both. Every loss names its scope, equals its closed form there, and is a sum divided by the global
count of targets, so that micro-batches add up. Letters: N tokens, E router outputs, J groups of
them.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from moebius.config import Variant
from moebius.model.context import Context
from moebius.model.ffn import RouteStats
from moebius.model.ffn.routers import Route

TABLE = {
    "budget": "moebius.model.ffn.balance.budget:Budget",
    "sign": "moebius.model.ffn.balance.sign:Sign",
    "group": "moebius.model.ffn.balance.group:GroupLoss",
    "switch": "moebius.model.ffn.balance.switch:SwitchLoss",
    "router_z": "moebius.model.ffn.balance.router_z:RouterZ",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a rule is told of its router: FFN experts first, then zero experts."""

    num_ffn: int
    num_zero: int
    top_k: int
    # Mean number of FFN experts a token should get (top_k where there are no zero experts).
    ffn_per_token: float

    @property
    def num_outputs(self) -> int:
        return self.num_ffn + self.num_zero


class BalanceRule(nn.Module, ABC):
    """The contract of a balance rule."""

    def bias_E(self) -> Tensor | None:
        """The selection bias, if the rule controls one."""
        return None

    @abstractmethod
    def loss(self, route: Route, ctx: Context) -> Tensor | None:
        """The loss of these tokens, divided by the global count; None if the rule adds none."""

    def probability_gradient(self, stats: RouteStats) -> Tensor | None:
        """dL/dP_E of the rule's loss, P the batch-mean scores; None if it adds none."""
        return None

    def after_step(self, stats: RouteStats, step: int) -> None:
        """Move the rule's buffers by what the router did in the global batch of `step`."""


@dataclasses.dataclass(frozen=True)
class BalanceConfig(Variant, ABC):
    """The config of a balance rule."""

    TABLE: ClassVar[Mapping[str, str]] = TABLE
    SEAM: ClassVar[str] = "balance rule"

    @abstractmethod
    def build(self, layout: Layout) -> BalanceRule:
        """The rule for a router of this layout."""
