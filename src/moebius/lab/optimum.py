"""The best learning rate of a grid: the vertex of a parabola in log2(rate) round the least loss."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np


def final_loss(losses: Sequence[float | None]) -> float | None:
    """The mean over the last tenth of the steps; None where one of them is not finite."""
    return _mean(losses[-max(1, len(losses) // 10) :])


def _mean(values: Sequence[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return statistics.fmean(kept) if kept and len(kept) == len(values) else None


def fitted(rates: Sequence[float], losses: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """The best rate of mean losses over seeds, and the best of every seed by itself.

    `losses` has a row a rate, in it a loss a seed; None stands for a run that diverged.
    """
    means = [_mean(row) for row in losses]
    by_seed = [optimum(rates, column) for column in zip(*losses, strict=True)]
    return {
        "rates": list(rates),
        "losses": [list(row) for row in losses],
        "mean_losses": means,
        **optimum(rates, means),
        "best_by_seed": [best["best_rate"] for best in by_seed],
    }


def optimum(rates: Sequence[float], losses: Sequence[float | None]) -> dict[str, Any]:
    """The vertex of the least-squares parabola through the rates within a factor 2 of the best.

    `inside` is False where the least loss is at an end of what was trained (or beside a run that
    diverged): the rate is then only a bound, and the grid must go further.
    """
    found = [(math.log2(r), x) for r, x in zip(rates, losses, strict=True) if x is not None]
    if not found:
        raise ValueError("no run of this width stayed finite; choose lower rates")
    at, least = min(found, key=lambda point: point[1])
    near = [(u - at, x) for u, x in found if abs(u - at) <= 1 + 1e-9]
    low, high = min(u for u, _ in near), max(u for u, _ in near)
    if not low < 0 < high:
        return {"best_rate": 2.0**at, "best_loss": least, "inside": False}
    us, losses_near = zip(*near, strict=True)
    a, b, c = (float(x) for x in np.polyfit(us, losses_near, 2))
    if a <= 0:  # points in a line, or so noisy that they bend down: the least of them is the best
        return {"best_rate": 2.0**at, "best_loss": least, "inside": True}
    vertex = min(max(-b / (2 * a), low), high)
    loss = a * vertex**2 + b * vertex + c
    return {"best_rate": 2.0 ** (at + vertex), "best_loss": loss, "inside": True}
