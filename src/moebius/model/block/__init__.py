"""The block seam: how residual streams are wired. A block is one file plus one line in `TABLE`.

A block holds mixers and feed-forwards and hands each its state. Letters: B T tokens, D width.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from moebius.config import Variant
from moebius.model.context import Context
from moebius.model.ffn import RouteStats
from moebius.model.mixers import DecodeState, Mixer
from moebius.model.part import Site

TABLE = {
    "prenorm": "moebius.model.block.prenorm:PreNorm",
    "scmoe": "moebius.model.block.scmoe:ScMoE",
}

States = tuple[DecodeState, ...]


@dataclasses.dataclass(frozen=True)
class BlockOutput:
    """What leaves a block."""

    x_BTD: Tensor
    states: States | None
    lent: dict[str, Tensor]
    # One entry a feed-forward that has a router.
    stats: tuple[RouteStats, ...]


class Block(nn.Module, ABC):
    """The contract of a block."""

    @abstractmethod
    def mixers(self) -> tuple[Mixer, ...]:
        """Its mixers, in the order of the states it takes and returns."""

    @abstractmethod
    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context,
        states: States | None,
        borrowed: Mapping[str, Tensor],
    ) -> BlockOutput:
        """Pass the residual stream through the block."""


@dataclasses.dataclass(frozen=True)
class BlockConfig(Variant, ABC):
    """The config of a block."""

    TABLE: ClassVar[Mapping[str, str]] = TABLE
    SEAM: ClassVar[str] = "block"

    @property
    @abstractmethod
    def num_writes(self) -> int:
        """How many sub-layers write to the residual stream."""

    @abstractmethod
    def build(self, site: Site) -> Block:
        """The module, its weights not yet initialised."""
