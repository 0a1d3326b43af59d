"""The load-balance loss of Switch Transformer (2101.03961, eq. 4), generalised to top-k.

Every router output is its own group with the same target. Scope `global` is the loss on the global
batch; scope `sequence` with normalised scores is DeepSeek-V3's sequence-wise loss (eq. 17-20).
"""

import dataclasses

from moebius.model.ffn.balance import BalanceConfig, BalanceRule, Layout
from moebius.model.ffn.balance.load import LoadLoss, Scope


@dataclasses.dataclass(frozen=True)
class SwitchLoss(BalanceConfig):
    """The loss is `coefficient` at uniform load."""

    coefficient: float = 1e-3
    scope: Scope = "global"

    def build(self, layout: Layout) -> BalanceRule:
        sizes = [1] * layout.num_outputs
        target = [layout.top_k / layout.num_outputs] * layout.num_outputs
        return LoadLoss(self.coefficient, self.scope, sizes, target)
