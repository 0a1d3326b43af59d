"""Forced-balanced routing: every output of a router used equally, its own choice left aside.

Published speeds of MoE are mostly of routing like this; a learned router's is the honest figure,
and the distance between the two is worth knowing. The learned router still computes its logits,
picks and weighs, and gets gradients; only the indices are replaced. A MoE with zero experts keeps
its budget. Letters: N tokens, E router outputs, S selected.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from moebius.config import fields
from moebius.model.ffn.balance import Layout
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers import Route, Router, RouterConfig
from moebius.model.part import Site
from moebius.train.run import Run


@dataclasses.dataclass(frozen=True)
class Balanced(RouterConfig):
    """`router` for the work, a round over `experts` and then over `zero_experts` for the result."""

    router: RouterConfig
    experts: int
    zero_experts: int
    ffn_per_token: float

    def build(self, site: Site, num_outputs: int, top_k: int) -> Router:
        layout = Layout(self.experts, self.zero_experts, top_k, self.ffn_per_token)
        assert layout.num_outputs == num_outputs
        return _Balanced(self.router.build(site, num_outputs, top_k), layout)


class _Balanced(Router):
    def __init__(self, learned: Router, layout: Layout) -> None:
        super().__init__()
        self.learned, self.layout = learned, layout

    def forward(self, x_ND: Tensor, bias_E: Tensor) -> Route:
        route: Route = self.learned(x_ND, bias_E)
        index_NS = rounds(x_ND.shape[0], self.layout, x_ND.device)
        return dataclasses.replace(route, index_NS=index_NS)

    def check_trainable(self) -> None:
        self.learned.check_trainable()


@functools.lru_cache(maxsize=8)
def rounds(num_tokens: int, layout: Layout, device: torch.device) -> Tensor:
    """index_NS by turns: FFN experts as the budget allows, counted over all tokens so far, then
    zero experts in the slots that remain. No token gets an output twice.
    """
    token_N1 = torch.arange(num_tokens, dtype=torch.float64)[:, None]
    slot_S = torch.arange(layout.top_k)
    before_N1 = (token_N1 * layout.ffn_per_token + 1e-9).floor().long()
    after_N1 = ((token_N1 + 1) * layout.ffn_per_token + 1e-9).floor().long()
    num_N1 = after_N1 - before_N1
    ffn_NS = (before_N1 + slot_S) % layout.num_ffn
    if not layout.num_zero:
        return ffn_NS.to(device)
    zeros_before_N1 = token_N1.long() * layout.top_k - before_N1
    zero_NS = layout.num_ffn + (zeros_before_N1 + slot_S - num_N1) % layout.num_zero
    return torch.where(slot_S < num_N1, ffn_NS, zero_NS).to(device)


def balanced_twin(run: Run) -> Run:
    """The same run with forced-balanced routing in every MoE."""
    return dataclasses.replace(run, name=f"{run.name}-balanced", model=_balanced(run.model))


def _balanced(value: Any) -> Any:
    if isinstance(value, MoE):
        layout = value.layout
        forced = Balanced(value.router, layout.num_ffn, layout.num_zero, layout.ffn_per_token)
        return dataclasses.replace(value, router=forced)
    if isinstance(value, tuple):
        return tuple(_balanced(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _balanced(getattr(value, f.name)) for f in fields(type(value))}
        return type(value)(**changed)
    return value
