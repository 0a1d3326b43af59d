"""Hunyuan-Large's three phases: warm-up, a long gradual decay, a short annealing to a tenth.

arXiv 2411.02265: the rate stays high early and decays slowly; over the last 5% of the tokens it
goes to a tenth of the peak, on the best data. The paper gives neither the shape of the long decay
nor where it ends: here half a cosine to `middle`, then a straight line to `floor`.
"""

import math
from dataclasses import dataclass

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
class ThreePhase(Schedule):
    warmup: Duration = "2%"
    annealing: Duration = "5%"
    middle: float = 0.5
    floor: float = 0.1

    def __post_init__(self) -> None:
        check_share("middle", self.middle)
        check_share("floor", self.floor)
        if self.floor > self.middle:
            raise ValueError(f"floor={self.floor} must not lie above middle={self.middle}")

    def factor(self, step: int, total_steps: int, tokens_per_step: int) -> float:
        warmup = in_steps(self.warmup, total_steps, tokens_per_step)
        annealing = in_steps(self.annealing, total_steps, tokens_per_step)
        check_fit(total_steps, {"warmup": warmup, "annealing": annealing})
        gradual = total_steps - warmup - annealing
        high = (1 + math.cos(math.pi * elapsed(step, warmup, gradual))) / 2
        decayed = self.middle + (1 - self.middle) * high
        annealed = elapsed(step, total_steps - annealing, annealing)
        return warming(step, warmup) * (decayed + (self.floor - decayed) * annealed)
