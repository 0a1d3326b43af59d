"""Means of paired differences with their 95% confidence intervals, by Student's t."""

import math
import statistics
from collections.abc import Sequence


def interval(differences: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The mean, and the ends of its 95% confidence interval; none for a single difference."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, None, None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    reach = error * student_t(len(differences) - 1)
    return mean, mean - reach, mean + reach


def student_t(freedom: int, confidence: float = 0.95) -> float:
    """The t that a Student variable of so many degrees of freedom stays within, by confidence.

    With t = sqrt(v) tan(a) the density is C cos(a)^(v - 1): Simpson's rule inside a bisection.
    """
    if freedom < 1:
        raise ValueError(f"Student's t needs at least one degree of freedom, not {freedom}")
    log_c = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2

    def inside(angle: float, pieces: int = 2000) -> float:
        heights = (math.cos(angle * i / pieces) ** (freedom - 1) for i in range(pieces + 1))
        weights = (1 if i in (0, pieces) else 2 + 2 * (i % 2) for i in range(pieces + 1))
        area = sum(w * h for w, h in zip(weights, heights, strict=True)) * angle / pieces / 3
        return 2 * math.exp(log_c) * area

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)
