"""Sigmoid router: scores are independent (DeepSeek-V3, Kimi Linear)."""

import dataclasses

import torch

from moebius.model.ffn.routers import Router, RouterConfig, Selection
from moebius.model.ffn.routers.linear import LinearRouter
from moebius.model.part import Site


@dataclasses.dataclass(frozen=True)
class Sigmoid(RouterConfig):
    """Options are those of `Selection`."""

    renormalise: bool = False
    num_groups: int = 1
    top_groups: int = 1

    def build(self, site: Site, num_outputs: int, top_k: int) -> Router:
        selection = Selection(top_k, self.renormalise, self.num_groups, self.top_groups)
        return LinearRouter(selection, site, num_outputs, torch.sigmoid)
