"""Mixture of experts: router + balance rules + experts, shared experts and zero experts.

Zero-computation experts (LongCat-Flash 2.1) return their input, weighted and scaled like the
others; they are the last router outputs. The routed sum is multiplied by `scaling` and, where a
dense FFN was split into m finer experts, by LongCat's variance compensation m (2.3.2, eq. 8), for
which they are drawn as slices of that FFN; shared experts are not. Letters: N tokens, D width, F
expert width, E experts, S selected.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from moebius.model.context import Context
from moebius.model.ffn import FeedForward, FeedForwardConfig, Pending, RouteStats
from moebius.model.ffn.balance import BalanceConfig, BalanceRule, Layout
from moebius.model.ffn.capacity import Capacity, fit
from moebius.model.ffn.routers import Route, RouterConfig
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.part import Site
from moebius.model.weight import Weight
from moebius.monitor.tap import tap
from moebius.ops.dispatch import combine, dispatch
from moebius.ops.experts import experts
from moebius.ops.inject import inject
from moebius.ops.linear import at_least_fp32, linear
from moebius.ops.ranks import Cut, Ranks, Spread, added, all_rows, own_rows, size_of
from moebius.ops.swiglu import clamped_swiglu, swiglu


@dataclasses.dataclass(frozen=True)
class Clamp:
    """gpt-oss's SwiGLU: gate and up limited, `gate * sigmoid(alpha * gate) * (up + 1)`."""

    alpha: float = 1.702
    limit: float = 7.0


@dataclasses.dataclass(frozen=True)
class MoE(FeedForwardConfig):
    """`experts` SwiGLUs of width `expert_width`; a token gets `top_k` of them and zero experts."""

    experts: int
    expert_width: int
    top_k: int
    zero_experts: int = 0
    # The budget: mean FFN experts per token; needs zero experts when below top_k.
    ffn_per_token: float | None = None
    shared_experts: int = 0
    scaling: float = 1.0
    # m of the variance compensation: how many of these experts a dense FFN was split into.
    split: float = 1.0
    router: RouterConfig = Softmax()
    balance: tuple[BalanceConfig, ...] = ()
    capacity: Capacity | None = None
    # Biases of the routed experts, and another activation than SwiGLU (gpt-oss has both).
    bias: bool = False
    clamp: Clamp | None = None

    @property
    def layout(self) -> Layout:
        """What balance rules are told; ValueError where the budget does not fit."""
        budget = float(self.top_k if self.ffn_per_token is None else self.ffn_per_token)
        if not 0 < budget <= self.top_k:
            raise ValueError(f"ffn_per_token ({budget}) must lie in 0..top_k ({self.top_k})")
        if budget < self.top_k and self.zero_experts == 0:
            raise ValueError("ffn_per_token below top_k needs zero_experts to take the rest")
        if budget == self.top_k and self.zero_experts > 0:
            raise ValueError("zero_experts need ffn_per_token below top_k, or nothing reaches them")
        if self.zero_experts and budget > self.experts:
            raise ValueError(f"ffn_per_token ({budget}) exceeds the {self.experts} experts")
        if self.top_k - budget > self.zero_experts:
            raise ValueError(
                f"ffn_per_token ({budget}) leaves {self.top_k - budget} of top_k ({self.top_k}) to "
                f"zero_experts ({self.zero_experts}), of which a token takes each once; add more"
            )
        return Layout(self.experts, self.zero_experts, self.top_k, budget)

    def build(self, site: Site) -> FeedForward:
        return MoELayer(self, site)


class MoELayer(FeedForward, Spread):
    def __init__(self, config: MoE, site: Site) -> None:
        super().__init__()
        self.config, self.layout, self.layer = config, config.layout, site.layer
        self.ranks = Ranks()
        num_experts, hidden, width = config.experts, config.expert_width, site.width
        self.router = config.router.build(site, self.layout.num_outputs, config.top_k)
        self.rules = nn.ModuleList(rule.build(self.layout) for rule in config.balance)
        gate_up, down = (num_experts, 2 * hidden, width), (num_experts, width, hidden)
        self.w_gate_up_E2FD = Weight(gate_up, "expert", std=site.into(width), blocks=2)
        # The deviation of the unsplit FFN: eq. 8 counts the narrower hidden layer as lost variance.
        down_std = site.back(hidden) * config.split**-0.5
        self.w_down_EDF = Weight(down, "expert", std=down_std)
        self.b_gate_up_E2F = self.b_down_ED = None
        if config.bias:
            self.b_gate_up_E2F = Weight((num_experts, 2 * hidden), "bias")
            self.b_down_ED = Weight((num_experts, width), "bias")
        self.activation = swiglu
        if config.clamp is not None:
            limits = dataclasses.asdict(config.clamp)
            self.activation = partial(clamped_swiglu, **limits)
        self.shared_gate_up = self.shared_down = None
        if config.shared_experts:
            shared = config.shared_experts * hidden
            into, back = site.into(width), site.back(shared)
            self.shared_gate_up = Weight((2 * shared, width), "matrix", std=into, blocks=2)
            self.shared_down = Weight((width, shared), "matrix", std=back)
        self.scale = config.scaling * config.split

    def balance_rules(self) -> list[BalanceRule]:
        """The rules, typed."""
        return [rule for rule in self.rules if isinstance(rule, BalanceRule)]

    def spread(self, ranks: Ranks) -> Mapping[str, Cut]:
        """Each rank of `ranks.experts` holds an equal share of the FFN experts, each of
        `ranks.tensor` an equal share of the hidden units of the shared ones."""
        capacity, share = self.config.capacity, size_of(ranks.experts)
        if capacity is not None and capacity.scope == "micro_batch" and size_of(ranks.data) > 1:
            raise ValueError(
                f"layer {self.layer}: capacity of scope micro_batch has no order of tokens over "
                "ranks; use scope sequence"
            )
        if self.layout.num_ffn % share:
            raise ValueError(
                f"layer {self.layer}: parallel.ep={share} must divide its "
                f"{self.layout.num_ffn} experts"
            )
        self.ranks = ranks
        cuts = dict.fromkeys(self._expert_weights(), Cut(ranks.experts))
        if self.shared_gate_up is not None:
            cuts["shared_gate_up"] = Cut(ranks.tensor, blocks=2)
            cuts["shared_down"] = Cut(ranks.tensor, dim=1)
        return cuts

    def begin(self, h_BTD: Tensor, ctx: Context) -> Pending:
        route: Route = self.router(h_BTD.flatten(0, 1), self.bias_E())
        index_NS, weight_NS = route.index_NS, route.weight_NS
        dropped = recycled = torch.zeros((), dtype=torch.int64, device=h_BTD.device)
        if self.training and self.config.capacity is not None:
            given = (self.config.capacity, self.layout, route, ctx, self.layer)
            fitted = fit(*given, self.ranks.context)
            index_NS, weight_NS = fitted.index_NS, fitted.weight_NS
            dropped, recycled = fitted.num_dropped, fitted.num_recycled
        stats = self._stats(route, ctx, dropped, recycled)
        weight_NS = weight_NS * self.scale
        if torch.is_grad_enabled():
            for rule in self.balance_rules():
                loss = rule.loss(route, ctx)
                weight_NS = weight_NS if loss is None else inject(weight_NS, loss)
        # Ranks that have the same tokens each see to the experts of some of them.
        x_ND, same = h_BTD.flatten(0, 1), self.ranks.tensor
        own = (own_rows(x_ND, same), own_rows(index_NS, same), own_rows(weight_NS, same))
        ways = (self.ranks.experts, self.ranks.exchange)
        sent = dispatch(*own, self.layout.num_ffn, *ways)
        return Pending(h_BTD, ctx, index_NS, weight_NS, stats, sent)

    def compute(self, pending: Pending) -> Pending:
        assert pending.sent is not None and not pending.sent.computed
        rows = pending.sent.arrived()
        weights = (self.w_gate_up_E2FD, self.w_down_EDF, self.b_gate_up_E2F, self.b_down_ED)
        y_MD = experts(rows.x_MD, rows.index_MS, rows.weight_MS, *weights, self.activation)
        return dataclasses.replace(pending, sent=pending.sent.returning(y_MD))

    def finish(self, pending: Pending) -> tuple[Tensor, RouteStats | None]:
        x_ND, shared_ND = pending.h_BTD.flatten(0, 1), None
        if self.shared_gate_up is not None and self.shared_down is not None:
            # Before anything is waited for.
            shared_ND = linear(swiglu(linear(x_ND, self.shared_gate_up)), self.shared_down)
            shared_ND = added(shared_ND, self.ranks.tensor)
        index_NS, weight_NS, sent = pending.index_NS, pending.weight_NS, pending.sent
        assert index_NS is not None and weight_NS is not None
        assert sent is not None and sent.computed, "compute comes before finish"
        y_ND = all_rows(combine(sent), len(x_ND), self.ranks.tensor)
        if self.layout.num_zero:
            is_zero_NS = (index_NS >= self.layout.num_ffn) & (index_NS < self.layout.num_outputs)
            zero_N1 = (weight_NS * is_zero_NS).sum(-1, keepdim=True)
            y_ND = y_ND + zero_N1.to(x_ND.dtype) * x_ND
        y_ND = y_ND if shared_ND is None else y_ND + shared_ND
        return y_ND.view_as(pending.h_BTD), pending.stats

    def bias_E(self) -> Tensor:
        """The sum of the rules' selection biases."""
        bias_E = torch.zeros(self.layout.num_outputs, device=self.w_down_EDF.device)
        for rule in self.balance_rules():
            moved_E = rule.bias_E()
            bias_E = bias_E if moved_E is None else bias_E + moved_E
        return bias_E

    def nothing(self, dtype: torch.dtype) -> RouteStats:
        """The stats of no token at all, as of activations in `dtype`."""
        device, outputs = self.w_down_EDF.device, self.layout.num_outputs
        none = torch.zeros((), dtype=torch.int64, device=device)
        return RouteStats(
            count_E=none.expand(outputs),
            score_sum_E=torch.zeros(outputs, dtype=at_least_fp32(dtype), device=device),
            hist_S=none.expand(self.layout.top_k + 1),
            num_tokens=none,
            num_dropped=none,
            num_recycled=none,
        )

    @torch.no_grad()
    def _stats(self, route: Route, ctx: Context, dropped: Tensor, recycled: Tensor) -> RouteStats:
        valid_N = ctx.valid_BT.flatten()
        outputs, top_k = self.layout.num_outputs, self.layout.top_k
        counted_NS = torch.where(valid_N[:, None], route.index_NS, outputs)
        ffn_N = (route.index_NS < self.layout.num_ffn).sum(-1)
        tap("ffn_per_token", ffn_N)
        hist_N = torch.where(valid_N, ffn_N, top_k + 1)
        return RouteStats(
            count_E=torch.bincount(counted_NS.flatten(), minlength=outputs + 1)[:outputs],
            score_sum_E=(route.score_NE * valid_N[:, None]).sum(0),
            hist_S=torch.bincount(hist_N, minlength=top_k + 2)[: top_k + 1],
            num_tokens=valid_N.sum(),
            num_dropped=dropped,
            num_recycled=recycled,
        )

    def uses_per_token(self) -> dict[str, tuple[float, float, float]]:
        layout = self.layout
        least = float(max(0, layout.top_k - layout.num_zero))
        most = float(min(layout.top_k, layout.num_ffn))
        counts = (least, layout.ffn_per_token, most)
        share = tuple(count / layout.num_ffn for count in counts)
        return dict.fromkeys(self._expert_weights(), share)  # pyright: ignore

    def _expert_weights(self) -> list[str]:
        biases = ["b_gate_up_E2F", "b_down_ED"] if self.config.bias else []
        return ["w_gate_up_E2FD", "w_down_EDF", *biases]


def routers_of(block: nn.Module) -> list[MoELayer]:
    """The MoE layers inside a block, in the order of the stats it returns."""
    return [module for module in block.modules() if isinstance(module, MoELayer)]


def balance_rules(block: nn.Module) -> list[list[BalanceRule]]:
    """The balance rules of each MoE inside a block."""
    return [moe.balance_rules() for moe in routers_of(block)]
