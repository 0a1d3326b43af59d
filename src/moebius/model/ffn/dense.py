"""Dense SwiGLU feed-forward (Shazeer 2020), as in Llama 3. Letters: D width, F hidden width."""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from moebius.model.context import Context
from moebius.model.ffn import FeedForward, FeedForwardConfig, Pending, RouteStats
from moebius.model.part import Site
from moebius.model.weight import Weight
from moebius.ops.linear import linear
from moebius.ops.ranks import Cut, Ranks, Spread, added, share
from moebius.ops.swiglu import swiglu


@dataclasses.dataclass(frozen=True)
class Dense(FeedForwardConfig):
    """One SwiGLU of hidden width `hidden`."""

    hidden: int
    bias: bool = False

    def build(self, site: Site) -> FeedForward:
        return _Dense(self, site)


class _Dense(FeedForward, Spread):
    def __init__(self, config: Dense, site: Site) -> None:
        super().__init__()
        self.ranks = Ranks()
        gate_up, down = (2 * config.hidden, site.width), (site.width, config.hidden)
        self.w_gate_up = Weight(gate_up, "matrix", std=site.into(site.width), blocks=2)
        self.w_down = Weight(down, "matrix", std=site.back(config.hidden))
        self.b_gate_up = Weight((2 * config.hidden,), "bias") if config.bias else None
        self.b_down = Weight((site.width,), "bias") if config.bias else None

    def spread(self, ranks: Ranks) -> Mapping[str, Cut]:
        """Each rank of `ranks.tensor` computes with an equal share of the hidden units."""
        self.ranks = ranks
        cuts = {"w_gate_up": Cut(ranks.tensor, blocks=2), "w_down": Cut(ranks.tensor, dim=1)}
        return cuts if self.b_gate_up is None else {**cuts, "b_gate_up": cuts["w_gate_up"]}

    def begin(self, h_BTD: Tensor, ctx: Context) -> Pending:
        return Pending(h_BTD, ctx)

    def finish(self, pending: Pending) -> tuple[Tensor, RouteStats | None]:
        hidden = swiglu(linear(pending.h_BTD, self.w_gate_up, self.b_gate_up))
        y_BTD = linear(hidden, self.w_down, share(self.b_down, self.ranks.tensor))
        return added(y_BTD, self.ranks.tensor), None
