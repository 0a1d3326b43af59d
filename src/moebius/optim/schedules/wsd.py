"""WSD: linear warm-up, a long stable phase, and a decay to `floor` over the last steps.

MiniCPM (arXiv 2404.06395); the decay's shape "sqrt" is 1 - sqrt(progress) of Haegele et al. (arXiv
2405.18392). Steps count from 0; both durations are in steps, tokens or percent of the run.
"""

import math
from dataclasses import dataclass
from typing import Literal

from moebius.optim.schedules import (
    Duration,
    Schedule,
    check_fit,
    check_share,
    elapsed,
    in_steps,
    warming,
)


@dataclass(frozen=True)
class WSD(Schedule):
    warmup: Duration = "2%"
    decay: Duration = "20%"
    floor: float = 0.0
    shape: Literal["linear", "sqrt", "cosine"] = "linear"

    def __post_init__(self) -> None:
        check_share("floor", self.floor)

    def factor(self, step: int, total_steps: int, tokens_per_step: int) -> float:
        warmup = in_steps(self.warmup, total_steps, tokens_per_step)
        decay = in_steps(self.decay, total_steps, tokens_per_step)
        check_fit(total_steps, {"warmup": warmup, "decay": decay})
        high = self._high(elapsed(step, total_steps - decay, decay))
        return warming(step, warmup) * (self.floor + (1 - self.floor) * high)

    def _high(self, progress: float) -> float:
        if self.shape == "linear":
            return 1 - progress
        if self.shape == "sqrt":
            return 1 - math.sqrt(progress)
        return (1 + math.cos(math.pi * progress)) / 2
