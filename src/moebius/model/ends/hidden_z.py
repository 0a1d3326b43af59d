"""LongCat-Flash's hidden z-loss (3.1.3, eq. 10): no massive activations before the final norm.

coefficient * mean over tokens of (log sum_i exp|z_i|)^2; its scope is the token.
"""

import dataclasses

from torch import Tensor

from moebius.model.context import Context
from moebius.model.ends import End, EndConfig
from moebius.model.ends.head import Embedding, Head
from moebius.model.part import Site
from moebius.ops.inject import inject
from moebius.ops.linear import at_least_fp32


@dataclasses.dataclass(frozen=True)
class HiddenZ(EndConfig):
    """The default coefficient is that of Meituan's released training scripts."""

    coefficient: float = 1e-7

    def build(self, site: Site) -> End:
        return _HiddenZ(self)


class _HiddenZ(End):
    LOOKS_UP = False

    def __init__(self, config: HiddenZ) -> None:
        super().__init__()
        self.coefficient = config.coefficient

    def forward(
        self, hidden_BTD: Tensor, targets_BT: Tensor, ctx: Context, embed: Embedding, head: Head
    ) -> tuple[Tensor, dict[str, Tensor]]:
        wide_BTD = hidden_BTD.to(at_least_fp32(hidden_BTD.dtype))
        square_BT = wide_BTD.abs().logsumexp(-1).square() * ctx.valid_BT
        total = square_BT.sum()
        loss = self.coefficient * total / ctx.num_targets
        return inject(hidden_BTD, loss), {"hidden_z": total.detach()}
