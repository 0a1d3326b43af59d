"""Load losses over any grouping of experts, in three scopes: alpha * sum_j f_j P_j.

f_j is the load of group j over its target, P_j its mean probability; at target load the loss is
alpha whatever P. `sequence` and `micro_batch` take both from the tokens of that scope. `global`
cannot know f of the global batch while its first micro-batch runs backward; it takes f of the
PREVIOUS global batch (uniform before the first), so gradients do not depend on the micro-batch
split.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from moebius.model.context import Context
from moebius.model.ffn import RouteStats
from moebius.model.ffn.balance import BalanceRule
from moebius.model.ffn.routers import Route
from moebius.ops.ranks import Cut, Ranks, Spread, summed

Scope = Literal["sequence", "micro_batch", "global"]


class LoadLoss(BalanceRule, Spread):
    """The loss of one grouping; final, used by every load-loss config."""

    load: Tensor

    def __init__(
        self, coefficient: float, scope: Scope, sizes: list[int], target: list[float]
    ) -> None:
        """`sizes` of consecutive groups, which together are all router outputs."""
        super().__init__()
        self.coefficient, self.scope, self.ranks = coefficient, scope, Ranks()
        groups = torch.eye(len(sizes), dtype=torch.float64)
        rows = [group_J.expand(size, -1) for group_J, size in zip(groups, sizes, strict=True)]
        self.register_buffer("member", torch.cat(rows), persistent=False)
        target_J = torch.tensor(target, dtype=torch.float64)
        self.register_buffer("target", target_J, persistent=False)
        self.register_buffer("load", torch.ones(len(sizes)))
        self.member: Tensor
        self.target: Tensor

    def spread(self, ranks: Ranks) -> Mapping[str, Cut]:
        self.ranks = ranks
        return {}

    def loss(self, route: Route, ctx: Context) -> Tensor | None:
        # X scopes of equal length.
        valid_XT = ctx.valid_BT if self.scope == "sequence" else ctx.valid_BT.reshape(1, -1)
        score_XTE = route.score_NE.view(*valid_XT.shape, -1)
        load_XE = self._load_XJ(route, valid_XT) @ self.member.to(score_XTE.dtype).T
        # sum_E load * score over sum_E score, for each token, by one product.
        sides_XE2 = torch.stack((load_XE, torch.ones_like(load_XE)), dim=-1)
        loaded_XT, whole_XT = (score_XTE @ sides_XE2).unbind(-1)
        total = torch.where(valid_XT, loaded_XT / whole_XT, 0.0).sum()
        return self.coefficient * total / ctx.num_targets

    def _load_XJ(self, route: Route, valid_XT: Tensor) -> Tensor:
        """The load of each group over its target, in each scope."""
        scopes, num_outputs = len(valid_XT), route.score_NE.shape[-1]
        if self.scope == "global":
            return self.load.to(route.score_NE.dtype).expand(1, -1)
        first_X11 = num_outputs * torch.arange(scopes, device=valid_XT.device)[:, None, None]
        slot_XTS = route.index_NS.view(*valid_XT.shape, -1) + first_X11
        slot_XTS = torch.where(valid_XT[..., None], slot_XTS, scopes * num_outputs)
        count = torch.bincount(slot_XTS.flatten(), minlength=scopes * num_outputs + 1)[:-1]
        tokens_X1 = valid_XT.sum(1, keepdim=True)
        # The loss of what ranks read together: each adds its own tokens' part.
        shared = self.ranks.context if self.scope == "sequence" else self.ranks.data
        count, tokens_X1 = summed(count, shared), summed(tokens_X1, shared)
        count_XJ = self._grouped(count.view(scopes, -1).to(route.score_NE.dtype))
        return count_XJ / tokens_X1.clamp(min=1) / self.target.to(count_XJ.dtype)

    def _grouped(self, x_XE: Tensor) -> Tensor:
        return x_XE @ self.member.to(x_XE.dtype)

    def _load_J(self, stats: RouteStats) -> Tensor:
        share_E = stats.count_E.double() / stats.num_tokens.clamp(min=1)
        return (self._grouped(share_E) / self.target).to(self.load.dtype)

    def probability_gradient(self, stats: RouteStats) -> Tensor | None:
        load_E = self.member @ self._load_J(stats).double()
        return self.coefficient * load_E.to(stats.score_sum_E.dtype)

    @torch.no_grad()
    def after_step(self, stats: RouteStats, step: int) -> None:
        if self.scope == "global":
            self.load.copy_(self._load_J(stats))
