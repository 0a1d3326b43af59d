"""The contract of a learning-rate schedule: a pure function of the step that multiplies the rate.

Durations are written in steps, tokens or percent of the run ("200", "200 steps", "3e6 tokens",
"5%") and read by one function. Steps count from 0; a warm-up of W steps gives 1/W at step 0 and 1
at step W - 1; a schedule that decays reaches its floor at the last step.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from moebius.config import Variant

# Text first, so that the command line reads `warmup=5%` and `warmup=200` alike.
Duration = str | int
_DURATION = re.compile(r"([0-9]*\.?[0-9]+(?:e\+?[0-9]+)?)\s*(steps?|tokens?|%|)")


@dataclass(frozen=True)
class Schedule(Variant, ABC):
    """How the learning rate goes over a run of `total_steps`."""

    SEAM: ClassVar[str] = "schedule"
    TABLE: ClassVar[Mapping[str, str]] = {
        "constant": "moebius.optim.schedules.constant:Constant",
        "cosine": "moebius.optim.schedules.cosine:Cosine",
        "three_phase": "moebius.optim.schedules.three_phase:ThreePhase",
        "wsd": "moebius.optim.schedules.wsd:WSD",
    }

    @abstractmethod
    def factor(self, step: int, total_steps: int, tokens_per_step: int) -> float:
        """The multiplier at `step`; ValueError if the phases do not fit into the run."""


def in_steps(duration: Duration, total_steps: int, tokens_per_step: int) -> int:
    """A duration in whole steps: tokens are rounded up to steps, percents to the nearest step."""
    text = str(duration).strip()
    match = _DURATION.fullmatch(text.lower())
    if match is None:
        raise ValueError(
            f"{text!r} is not a duration; write '200', '200 steps', '3e6 tokens' or '5%'"
        )
    amount, unit = float(match[1]), match[2]
    if not math.isfinite(amount):
        raise ValueError(f"the duration {text!r} is too large")
    if unit.startswith("token"):
        return math.ceil(amount / tokens_per_step)
    if unit == "%":
        if amount > 100:
            raise ValueError(f"the duration {text!r} is longer than the run; write at most '100%'")
        return round(amount * total_steps / 100)
    if not amount.is_integer():
        raise ValueError(f"the duration {text!r} is not a whole number of steps")
    return int(amount)


def warming(step: int, warmup: int) -> float:
    """The linear warm-up: 1/W, 2/W, ... 1 over the first W steps, 1 after them."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def elapsed(step: int, start: int, length: int) -> float:
    """The share of a phase that is over once `step` is: 1/length at its first step, 1 at its last.

    Counted to the end of the step, so that 0 is the step before it and 1 is reached.
    """
    if length == 0:
        return 0.0 if step < start else 1.0
    return min(1.0, max(0.0, (step + 1 - start) / length))


def check_fit(total_steps: int, phases: Mapping[str, int]) -> None:
    """Refuse phases that together are longer than the run."""
    if sum(phases.values()) > total_steps:
        listed = " and ".join(f"{name} {length}" for name, length in phases.items())
        raise ValueError(
            f"{listed} steps do not fit into a run of {total_steps}; shorten them or raise steps"
        )


def check_share(name: str, value: float) -> None:
    """Refuse a share of the peak rate outside [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is a share of the peak rate; it must lie in [0, 1]")
