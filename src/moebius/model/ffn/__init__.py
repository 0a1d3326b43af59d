"""The feed-forward seam: what each token computes. A feed-forward is one file plus one line.

It is calls between which a block may run other work: `begin(h) -> pending` decides and sends,
`compute(pending)` receives, computes and sends back, `finish(pending) -> (y, stats)` receives.
Letters: B T tokens, D width, E router outputs, S selected per token.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from moebius.config import Variant
from moebius.model.context import Context
from moebius.model.part import Site
from moebius.ops.dispatch import Dispatched

TABLE = {
    "dense": "moebius.model.ffn.dense:Dense",
    "moe": "moebius.model.ffn.moe:MoE",
}


@dataclasses.dataclass(frozen=True)
class RouteStats:
    """What a router did, as sums over valid tokens: adding the stats of micro-batches is exact."""

    count_E: Tensor  # int64, assignments to each router output, before any capacity
    score_sum_E: Tensor  # at least fp32, sum of the scores
    hist_S: Tensor  # int64 [S + 1], tokens with 0..S FFN experts
    num_tokens: Tensor  # int64
    num_dropped: Tensor  # int64, assignments over capacity that were left out
    num_recycled: Tensor  # int64, assignments over capacity that went elsewhere

    def __add__(self, other: "RouteStats") -> "RouteStats":
        names = [field.name for field in dataclasses.fields(self)]
        return RouteStats(*(getattr(self, name) + getattr(other, name) for name in names))

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the fields."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


@dataclasses.dataclass(frozen=True)
class Pending:
    """What `begin` hands to `finish`: the input, and for a MoE the routing of its tokens."""

    h_BTD: Tensor
    ctx: Context
    index_NS: Tensor | None = None
    weight_NS: Tensor | None = None
    stats: RouteStats | None = None
    # What the experts that lie here are to compute.
    sent: Dispatched | None = None


class FeedForward(nn.Module, ABC):
    """The contract of a feed-forward."""

    @abstractmethod
    def begin(self, h_BTD: Tensor, ctx: Context) -> Pending:
        """Decide where tokens go and start moving them."""

    def compute(self, pending: Pending) -> Pending:
        """Compute what arrived and start moving it back; nothing where nothing moves."""
        return pending

    @abstractmethod
    def finish(self, pending: Pending) -> tuple[Tensor, RouteStats | None]:
        """The output y_BTD in the dtype of h, and what the router did (None without a router)."""

    def forward(self, h_BTD: Tensor, ctx: Context) -> tuple[Tensor, RouteStats | None]:
        return self.finish(self.compute(self.begin(h_BTD, ctx)))

    def uses_per_token(self) -> Mapping[str, tuple[float, float, float]]:
        """Share (min, mean, max) of a weight a token touches, by its name here; absent: all."""
        return {}


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig(Variant, ABC):
    """The config of a feed-forward."""

    TABLE: ClassVar[Mapping[str, str]] = TABLE
    SEAM: ClassVar[str] = "ffn"

    @abstractmethod
    def build(self, site: Site) -> FeedForward:
        """The module, its weights not yet initialised."""


__all__ = ["TABLE", "FeedForward", "FeedForwardConfig", "Pending", "RouteStats"]
