"""Sigmoid router: scores are independent (DeepSeek-V3, Kimi Linear)."""

import dataclasses

from torch import Tensor

from moebius.model.ffn.routers import Route, Router, RouterConfig, Selection
from moebius.model.part import Site
from moebius.model.weight import Weight
from moebius.ops.linear import at_least_fp32, linear


@dataclasses.dataclass(frozen=True)
class Sigmoid(RouterConfig):
    """Options are those of `Selection`."""

    renormalise: bool = False
    num_groups: int = 1
    top_groups: int = 1

    def build(self, site: Site, num_outputs: int, top_k: int) -> Router:
        selection = Selection(top_k, self.renormalise, self.num_groups, self.top_groups)
        selection.check(num_outputs)
        return _Sigmoid(selection, site, num_outputs)


class _Sigmoid(Router):
    def __init__(self, selection: Selection, site: Site, num_outputs: int) -> None:
        super().__init__()
        self.selection = selection
        self.w_ED = Weight((num_outputs, site.width), "router", std=site.into(site.width))

    def forward(self, x_ND: Tensor, bias_E: Tensor) -> Route:
        logit_NE = linear(x_ND.to(at_least_fp32(x_ND.dtype)), self.w_ED)
        return self.selection(logit_NE, logit_NE.sigmoid(), bias_E)
