"""LongCat-Flash's expert-bias controller (2.2, eq. 2): a budget of FFN experts per token.

After each step the bias of FFN expert i moves by mu * (K_e / (K N) - T_i / (K T)), T_i its
assignments among T tokens; zero experts stay at bias 0, so their share follows. That is integral
control of the bias on the load error; `integral` and `derivative` add the missing gains of a PID on
the increments. mu decays by `decay` every `every` steps down to `floor`. `mean_gain` (ours)
multiplies the part of the error that all FFN experts share, the error of the budget itself: it is
far less noisy than that of one expert, so a short run may follow it much faster. How far scores lie
apart decides how much of it is too much, and changes as a router learns: with `adaptive` (ours)
`mean_gain` is the most, and the gain in use shrinks whenever the shared error changes sign.
"""

import dataclasses

import torch
from torch import Tensor

from moebius.model.context import Context
from moebius.model.ffn import RouteStats
from moebius.model.ffn.balance import BalanceConfig, BalanceRule, Layout
from moebius.model.ffn.routers import Route

# What multiplies an adaptive gain where the shared error keeps its sign, and where it changes.
GROW, SHRINK = 1.4, 0.7


@dataclasses.dataclass(frozen=True)
class Budget(BalanceConfig):
    """mu and its decay default to the values of Meituan's released fine-tuning scripts."""

    mu: float = 0.1
    decay: float = 0.5
    every: int = 1000
    floor: float = 0.01
    integral: float = 0.0
    derivative: float = 0.0
    mean_gain: float = 1.0
    adaptive: bool = False

    def build(self, layout: Layout) -> BalanceRule:
        return _Budget(self, layout)

    def mu_at(self, step: int) -> float:
        """The gain at a step."""
        return max(self.mu * self.decay ** (step // self.every), min(self.floor, self.mu))


class _Budget(BalanceRule):
    bias: Tensor
    error_sum: Tensor
    error_last: Tensor
    gain: Tensor

    def __init__(self, config: Budget, layout: Layout) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        for name in ("bias", "error_sum", "error_last"):
            self.register_buffer(name, torch.zeros(layout.num_outputs))
        gain = torch.tensor(config.mean_gain)
        self.register_buffer("gain", gain, persistent=config.adaptive)

    def bias_E(self) -> Tensor:
        return self.bias

    def loss(self, route: Route, ctx: Context) -> Tensor | None:
        return None

    @torch.no_grad()
    def after_step(self, stats: RouteStats, step: int) -> None:
        layout, config = self.layout, self.config
        # Whole assignments are compared, so that the error at target load is exactly 0.
        target = layout.ffn_per_token * stats.num_tokens.double()
        slots = layout.num_ffn * layout.top_k * stats.num_tokens.clamp(min=1)
        error_E = ((target - layout.num_ffn * stats.count_E) / slots).to(self.bias.dtype)
        ffn_E, mean = error_E[: layout.num_ffn], error_E[: layout.num_ffn].mean()
        if config.adaptive:
            kept = mean * self.error_last[: layout.num_ffn].mean() >= 0
            moved = self.gain * torch.where(kept, GROW, SHRINK)
            self.gain.copy_(moved.clamp(min=min(1.0, config.mean_gain), max=config.mean_gain))
        ffn_E += (self.gain - 1.0) * mean
        error_E[layout.num_ffn :] = 0.0
        self.error_sum += error_E
        slope_E = error_E - self.error_last
        move_E = error_E + config.integral * self.error_sum + config.derivative * slope_E
        self.bias += config.mu_at(step) * move_E
        self.error_last.copy_(error_E)
