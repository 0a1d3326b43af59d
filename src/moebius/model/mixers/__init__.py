"""The mixer seam: how tokens see each other. A mixer is one file plus one line in `TABLE`.

A mixer is `(x_BTD, ctx, state, borrowed) -> (y_BTD, state, lent)`. `state` is what it keeps while
decoding (None in training); `lent` are tensors that later layers may borrow by name.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from moebius.config import Variant
from moebius.model.context import Context
from moebius.model.mixers.logits import ScaleRows, scale_rows
from moebius.model.part import Site

TABLE = {
    "gqa": "moebius.model.mixers.gqa:GQA",
    "swa": "moebius.model.mixers.swa:SWA",
    "mla": "moebius.model.mixers.mla:MLA",
    "cla": "moebius.model.mixers.cla:CLA",
    "nsa": "moebius.model.mixers.nsa:NSA",
    "kda": "moebius.model.mixers.kda:KDA",
}


class DecodeState(ABC):
    """What a mixer remembers of a sequence. Immutable: a step returns a new one."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens seen so far."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes held."""

    @abstractmethod
    def snapshot(self) -> Self:
        """A state that later steps cannot change."""

    @abstractmethod
    def rollback(self, num_tokens: int) -> Self:
        """The state before the last `num_tokens` tokens; ValueError where they are out of reach."""


class Mixer(nn.Module, ABC):
    """The contract of a token mixer."""

    # Names of tensors this mixer lends to, and borrows from, other layers.
    lends: tuple[str, ...] = ()
    borrows: tuple[str, ...] = ()
    # What those tensors are (widths, positions, window): equal for a lender and its borrowers.
    loan: Mapping[str, Any] = MappingProxyType({})
    # Whether its logits are products of weights without bound, which QK-Clip may scale down.
    # Not so for heads with normed queries and keys, and for mixers without a softmax (KDA).
    clippable: bool = False

    @abstractmethod
    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context,
        state: DecodeState | None,
        borrowed: Mapping[str, Tensor],
    ) -> tuple[Tensor, DecodeState | None, dict[str, Tensor]]:
        """Mix tokens; with a state, x continues the tokens that the state has seen."""

    @abstractmethod
    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> DecodeState:
        """The state of `batch` empty sequences."""

    @abstractmethod
    def state_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Bytes that the state of one sequence holds once it has seen `context` tokens."""

    @abstractmethod
    def flops(self, context: int) -> float:
        """Forward FLOPs per token at a context length, beyond the products with weights."""

    def max_logits(self, x_BTD: Tensor, ctx: Context, borrowed: Mapping[str, Tensor]) -> Tensor:
        """max_H, the largest logit of each head before its softmax; only where `clippable`."""
        raise NotImplementedError(f"{type(self).__name__} has no logits to clip")

    def clip_logits(self, gamma_H: Tensor, scale: ScaleRows = scale_rows) -> None:
        """Scale weights in place so that each head's logits shrink by its gamma; as above."""
        raise NotImplementedError(f"{type(self).__name__} has no logits to clip")


@dataclasses.dataclass(frozen=True)
class MixerConfig(Variant, ABC):
    """The config of a mixer."""

    TABLE: ClassVar[Mapping[str, str]] = TABLE
    SEAM: ClassVar[str] = "mixer"

    @abstractmethod
    def build(self, site: Site) -> Mixer:
        """The module, its weights not yet initialised."""
