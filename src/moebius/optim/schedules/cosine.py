"""Linear warm-up, then half a cosine down to `floor` at the last step.

The schedule of Loshchilov and Hutter (2017) without restarts, with the warm-up that language models
add. Steps count from 0, and the warm-up is a duration in steps, tokens or percent of the run.
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
class Cosine(Schedule):
    warmup: Duration = "2%"
    floor: float = 0.1

    def __post_init__(self) -> None:
        check_share("floor", self.floor)

    def factor(self, step: int, total_steps: int, tokens_per_step: int) -> float:
        warmup = in_steps(self.warmup, total_steps, tokens_per_step)
        check_fit(total_steps, {"warmup": warmup})
        progress = elapsed(step, warmup, total_steps - warmup)
        high = (1 + math.cos(math.pi * progress)) / 2
        return warming(step, warmup) * (self.floor + (1 - self.floor) * high)
