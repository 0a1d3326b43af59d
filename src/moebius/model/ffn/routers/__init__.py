"""The router seam: scores of experts, and which of them a token gets. One file plus one line.

Scores are computed in at least fp32. A bias moves the selection, never the weights, and gets no
gradient (DeepSeek-V3; LongCat-Flash 2.1). Letters: N tokens, D width, E router outputs, S selected.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from moebius.config import Variant
from moebius.model.part import Site
from moebius.monitor.tap import tap_gradient
from moebius.ops.topk import topk

TABLE = {
    "softmax": "moebius.model.ffn.routers.softmax:Softmax",
    "sigmoid": "moebius.model.ffn.routers.sigmoid:Sigmoid",
}


@dataclasses.dataclass(frozen=True)
class Route:
    """The routing of N tokens."""

    logit_NE: Tensor  # at least fp32
    score_NE: Tensor  # at least fp32, what the weights are taken from
    index_NS: Tensor  # int64, selected router outputs
    weight_NS: Tensor  # at least fp32, their gates, before any scaling factor


@dataclasses.dataclass(frozen=True)
class Selection:
    """How the top S are chosen and weighted, the same for every kind of score."""

    top_k: int
    # Divide the selected weights by their sum (not in LongCat-Flash, yes in DeepSeek-V3).
    renormalise: bool = False
    # DeepSeek-V3's group-limited selection: only the best `top_groups` of `num_groups` groups of
    # consecutive experts are considered, a group scoring the sum of its two best experts.
    num_groups: int = 1
    top_groups: int = 1

    def check(self, num_outputs: int) -> None:
        """ValueError where the numbers do not fit `num_outputs` router outputs."""
        if not 1 <= self.top_k <= num_outputs:
            raise ValueError(
                f"top_k ({self.top_k}) must lie in 1..{num_outputs}, the router outputs"
            )
        if self.num_groups > 1 and num_outputs % self.num_groups:
            raise ValueError(f"num_groups ({self.num_groups}) must divide {num_outputs} outputs")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"top_groups ({self.top_groups}) must lie in 1..{self.num_groups}")
        if self.top_k > num_outputs // self.num_groups * self.top_groups:
            raise ValueError(f"top_k ({self.top_k}) exceeds the experts of top_groups groups")

    def __call__(self, logit_NE: Tensor, score_NE: Tensor, bias_E: Tensor) -> Route:
        """Select by score plus bias, weigh by score alone."""
        index_NS = topk(self._limited(score_NE.detach() + bias_E), self.top_k)
        weight_NS = tap_gradient("score", score_NE.gather(-1, index_NS), index_NS)
        if self.renormalise:
            weight_NS = weight_NS / weight_NS.sum(-1, keepdim=True)
        return Route(logit_NE, score_NE, index_NS, weight_NS)

    def _limited(self, biased_NE: Tensor) -> Tensor:
        if self.top_groups == self.num_groups:
            return biased_NE
        biased_NGX = biased_NE.unflatten(-1, (self.num_groups, -1))
        best = min(2, biased_NGX.shape[-1])
        group_NG = biased_NGX.topk(best, dim=-1).values.sum(-1)
        kept_NL = group_NG.topk(self.top_groups, dim=-1).indices
        keep_NG = torch.zeros_like(group_NG, dtype=torch.bool).scatter_(-1, kept_NL, True)
        return biased_NGX.masked_fill(~keep_NG[..., None], float("-inf")).flatten(-2)


class Router(nn.Module, ABC):
    """The contract of a router."""

    @abstractmethod
    def forward(self, x_ND: Tensor, bias_E: Tensor) -> Route:
        """Route tokens; `bias_E` is added to the scores for selection only."""

    def check_trainable(self) -> None:
        """ValueError where this router could run, but would never learn."""


@dataclasses.dataclass(frozen=True)
class RouterConfig(Variant, ABC):
    """The config of a router."""

    TABLE: ClassVar[Mapping[str, str]] = TABLE
    SEAM: ClassVar[str] = "router"

    @abstractmethod
    def build(self, site: Site, num_outputs: int, top_k: int) -> Router:
        """A router over `num_outputs` experts, of which each token gets `top_k`."""
