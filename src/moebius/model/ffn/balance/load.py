"""Load losses over any grouping of experts, in three scopes: alpha * sum_j f_j P_j.

f_j is the load of group j over its target, P_j its mean probability; at target load the loss is
alpha whatever P. `sequence` and `micro_batch` take both from the tokens of that scope. `global`
cannot know f of the global batch while its first micro-batch runs backward; it takes f of the
PREVIOUS global batch (uniform before the first), so gradients do not depend on the micro-batch
split.
"""

from typing import Literal

import torch
from torch import Tensor

from moebius.model.context import Context
from moebius.model.ffn import RouteStats
from moebius.model.ffn.balance import BalanceRule
from moebius.model.ffn.routers import Route

Scope = Literal["sequence", "micro_batch", "global"]


class LoadLoss(BalanceRule):
    """The loss of one grouping; final, used by every load-loss config."""

    load: Tensor

    def __init__(self, coefficient: float, scope: Scope, groups: list[slice], target: list[float]):
        super().__init__()
        self.coefficient, self.scope, self.groups = coefficient, scope, groups
        target_J = torch.tensor(target, dtype=torch.float64)
        self.register_buffer("target", target_J, persistent=False)
        self.register_buffer("load", torch.ones(len(groups)))
        self.target: Tensor

    def loss(self, route: Route, ctx: Context) -> Tensor | None:
        prob_NE = route.score_NE / route.score_NE.sum(-1, keepdim=True)
        prob_BTJ = self._grouped(prob_NE).unflatten(0, ctx.valid_BT.shape)
        prob_BTJ = prob_BTJ * ctx.valid_BT[..., None]
        if self.scope == "global":
            total = (self.load.to(prob_BTJ.dtype) * prob_BTJ.sum((0, 1))).sum()
            return self.coefficient * total / ctx.num_targets
        picked_NE = torch.zeros_like(route.score_NE).scatter_(-1, route.index_NS, 1.0)
        picked_BTJ = self._grouped(picked_NE).unflatten(0, ctx.valid_BT.shape)
        picked_BTJ = picked_BTJ * ctx.valid_BT[..., None]
        dims = (1,) if self.scope == "sequence" else (0, 1)
        tokens = ctx.valid_BT.sum(dims).clamp(min=1)[..., None]
        load = picked_BTJ.sum(dims) / tokens / self.target.to(prob_BTJ.dtype)
        return self.coefficient * (load * prob_BTJ.sum(dims)).sum() / ctx.num_targets

    def _grouped(self, x_NE: Tensor) -> Tensor:
        if len(self.groups) == x_NE.shape[-1]:
            return x_NE
        return torch.stack([x_NE[..., group].sum(-1) for group in self.groups], dim=-1)

    def _load_J(self, stats: RouteStats) -> Tensor:
        share_E = stats.count_E.double() / stats.num_tokens.clamp(min=1)
        return (self._grouped(share_E) / self.target).to(self.load.dtype)

    def probability_gradient(self, stats: RouteStats) -> Tensor | None:
        grad_E = torch.zeros_like(stats.score_sum_E)
        for group, load in zip(self.groups, self._load_J(stats), strict=True):
            grad_E[group] = self.coefficient * load.to(grad_E.dtype)
        return grad_E

    @torch.no_grad()
    def after_step(self, stats: RouteStats, step: int) -> None:
        if self.scope == "global":
            self.load.copy_(self._load_J(stats))
