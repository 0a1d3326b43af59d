"""Router z-loss (ST-MoE, 2202.08906, eq. 5): keeps router logits small.

coefficient * mean over tokens of logsumexp(logits)^2; its scope is the token, so any split adds up.
"""

import dataclasses

from torch import Tensor

from moebius.model.context import Context
from moebius.model.ffn.balance import BalanceConfig, BalanceRule, Layout
from moebius.model.ffn.routers import Route


@dataclasses.dataclass(frozen=True)
class RouterZ(BalanceConfig):
    """ST-MoE uses 1e-3; LongCat's released fine-tuning code 1e-4."""

    coefficient: float = 1e-4

    def build(self, layout: Layout) -> BalanceRule:
        return _RouterZ(self)


class _RouterZ(BalanceRule):
    def __init__(self, config: RouterZ) -> None:
        super().__init__()
        self.config = config

    def loss(self, route: Route, ctx: Context) -> Tensor | None:
        square_N = route.logit_NE.logsumexp(-1).square() * ctx.valid_BT.flatten()
        return self.config.coefficient * square_N.sum() / ctx.num_targets
