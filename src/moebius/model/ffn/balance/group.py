"""LongCat-Flash's device-level load-balance loss (2.3, eq. 3-5), with the zero-expert group.

FFN experts are split into `groups` equal groups (devices; each expert its own where it is None);
all zero experts form one group more. Selections are counted as slots, so that the loss is
`coefficient` at target load.
"""

import dataclasses

from moebius.model.ffn.balance import BalanceConfig, BalanceRule, Layout
from moebius.model.ffn.balance.load import LoadLoss, Scope


@dataclasses.dataclass(frozen=True)
class GroupLoss(BalanceConfig):
    """Choose the coefficient so that R_g stays below 0.1."""

    coefficient: float = 1e-4
    groups: int | None = None
    scope: Scope = "micro_batch"

    def build(self, layout: Layout) -> BalanceRule:
        groups = layout.num_ffn if self.groups is None else self.groups
        if groups < 1 or layout.num_ffn % groups:
            raise ValueError(f"groups ({groups}) must divide the {layout.num_ffn} FFN experts")
        sizes = [layout.num_ffn // groups] * groups
        target = [layout.ffn_per_token / groups] * groups
        if layout.num_zero:
            sizes.append(layout.num_zero)
            target.append(layout.top_k - layout.ffn_per_token)
        return LoadLoss(self.coefficient, self.scope, sizes, target)
