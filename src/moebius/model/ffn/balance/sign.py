"""DeepSeek-V3's loss-free balancing (2412.19437, 2.1.2): the bias moves by the sign of the error.

An expert below its target share gains `rate`, one above loses it. With zero experts in the layout
they keep bias 0 and FFN experts aim at the budget, as in `budget`.
"""

import dataclasses

import torch
from torch import Tensor

from moebius.model.context import Context
from moebius.model.ffn import RouteStats
from moebius.model.ffn.balance import BalanceConfig, BalanceRule, Layout
from moebius.model.ffn.routers import Route


@dataclasses.dataclass(frozen=True)
class Sign(BalanceConfig):
    """`rate` is DeepSeek-V3's bias update speed."""

    rate: float = 0.001

    def build(self, layout: Layout) -> BalanceRule:
        return _Sign(self, layout)


class _Sign(BalanceRule):
    bias: Tensor

    def __init__(self, config: Sign, layout: Layout) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        self.register_buffer("bias", torch.zeros(layout.num_outputs))

    def bias_E(self) -> Tensor:
        return self.bias

    def loss(self, route: Route, ctx: Context) -> Tensor | None:
        return None

    @torch.no_grad()
    def after_step(self, stats: RouteStats, step: int) -> None:
        # In whole assignments times experts, so that the sign is exact.
        target = self.layout.ffn_per_token * stats.num_tokens.double()
        error_E = target - stats.count_E * self.layout.num_ffn
        error_E[self.layout.num_ffn :] = 0
        self.bias += self.config.rate * error_E.sign().to(self.bias.dtype)
