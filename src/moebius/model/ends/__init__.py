"""The ends seam: what enters and leaves the stack of blocks. An end is one file plus one line.

The embedding and the head (`head.py`) are always there; `TABLE` lists what a recipe may add to
them. An end sees the last hidden states and returns them, its own loss injected by autograd, so
that the reported loss stays pure cross-entropy. Letters: B T tokens, D width, V vocabulary.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from moebius.config import Variant
from moebius.model.context import Context
from moebius.model.ends.head import Embedding, Head
from moebius.model.part import Site

TABLE = {
    "mtp": "moebius.model.ends.mtp:MTP",
    "hidden_z": "moebius.model.ends.hidden_z:HiddenZ",
}


class End(nn.Module, ABC):
    """The contract of an added end."""

    # Whether it calls the embedding, which a pipeline then lends to its stage.
    LOOKS_UP: ClassVar[bool] = True

    @abstractmethod
    def forward(
        self, hidden_BTD: Tensor, targets_BT: Tensor, ctx: Context, embed: Embedding, head: Head
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(hidden_BTD with the loss injected, sums to report); before the final norm."""


@dataclasses.dataclass(frozen=True)
class EndConfig(Variant, ABC):
    """The config of an added end."""

    TABLE: ClassVar[Mapping[str, str]] = TABLE
    SEAM: ClassVar[str] = "end"

    @abstractmethod
    def build(self, site: Site) -> End:
        """The module, its weights not yet initialised."""
