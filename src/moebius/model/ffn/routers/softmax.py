"""Softmax router: scores compete (Switch, Hunyuan-Large, LongCat-Flash 2.1).

Renormalised, it equals a softmax over the selected logits alone (gpt-oss).
"""

import dataclasses
from functools import partial

import torch

from moebius.model.ffn.routers import Router, RouterConfig, Selection
from moebius.model.ffn.routers.linear import LinearRouter
from moebius.model.part import Site


@dataclasses.dataclass(frozen=True)
class Softmax(RouterConfig):
    """Options are those of `Selection`; `bias` adds a learned one to each logit."""

    renormalise: bool = False
    num_groups: int = 1
    top_groups: int = 1
    bias: bool = False

    def build(self, site: Site, num_outputs: int, top_k: int) -> Router:
        selection = Selection(top_k, self.renormalise, self.num_groups, self.top_groups)
        softmax = partial(torch.softmax, dim=-1)
        return LinearRouter(selection, site, num_outputs, softmax, self.bias)
