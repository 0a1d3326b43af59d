"""A constant learning rate after a linear warm-up.

For short trials and for phases that continue a run at its last rate. Steps count from 0, and the
warm-up is a duration in steps, tokens or percent of the run.
"""

from dataclasses import dataclass

from moebius.optim.schedules import Duration, Schedule, check_fit, in_steps, warming


@dataclass(frozen=True)
class Constant(Schedule):
    warmup: Duration = "0"

    def factor(self, step: int, total_steps: int, tokens_per_step: int) -> float:
        warmup = in_steps(self.warmup, total_steps, tokens_per_step)
        check_fit(total_steps, {"warmup": warmup})
        return warming(step, warmup)
