"""What a race between a MoE and its dense twin says: of one pair, of all seeds, and as charts.

A side is what became of one model: its `loss` and `seconds` at its end, and its `curve` of
[step, seconds, loss].
"""

import statistics
from collections.abc import Sequence
from typing import Any

from moebius.lab.draw import Chart, Line
from moebius.lab.growth import paired

NAMES = ("moe", "dense")
SHOWN = {"moe": "MoE", "dense": "dense twin"}


def compared(moe: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """Who was faster. `reached_seconds` is when the MoE was first seen at the twin's final loss."""
    met = (seconds for _, seconds, loss in moe["curve"] if loss <= dense["loss"])
    reached = next(met, None)
    return {
        "moe": moe,
        "dense": dense,
        "reached_seconds": reached,
        "reached_share": None if reached is None else reached / dense["seconds"],
        "time_ratio": moe["seconds"] / dense["seconds"],
        "difference": moe["loss"] - dense["loss"],
        # At its own end, its schedule over: no worse, and earlier.
        "wins": moe["loss"] <= dense["loss"] and moe["seconds"] < dense["seconds"],
    }


def says(row: dict[str, Any]) -> str:
    ends = ", ".join(
        f"{SHOWN[name]} {row[name]['loss']:.4f} after {row[name]['seconds']:.0f} s"
        for name in NAMES
    )
    if row["reached_share"] is None:
        return f"{ends}; the MoE never reached the twin's final loss"
    return f"{ends}; the MoE was there after {row['reached_share']:.0%} of the twin's time"


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    wins = sum(row["wins"] for row in rows)
    ratio = statistics.fmean(row["time_ratio"] for row in rows)
    shares = [row["reached_share"] for row in rows]
    mean = (
        None if None in shares else statistics.fmean(share for share in shares if share is not None)
    )
    difference = paired([row["difference"] for row in rows], "the MoE")
    first = sum(share is not None and share < 1 for share in shares)
    return {
        "first": first,
        "wins": wins,
        "time_ratio": ratio,
        "reached_share": mean,
        "difference": difference,
        "says": f"in {first} of {len(rows)} races the MoE was first at its dense twin's final loss"
        f"{'' if mean is None else f', on average after {mean:.0%} of the time'}; in {wins} it "
        f"ended at no higher loss in less time: {ratio:.2f} of the twin's time, MoE minus twin "
        f"{difference['says']}",
    }


def race_charts(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """Held-out loss over time of every seed: all of it but the start, and the end."""
    ends = [row[name]["loss"] for row in rows for name in NAMES]
    lines = tuple(
        Line(
            SHOWN[name],
            tuple(seconds for _, seconds, _ in row[name]["curve"]),
            tuple(loss for _, _, loss in row[name]["curve"]),
            ((row[name]["seconds"], row[name]["loss"]),),
        )
        for row in rows
        for name in NAMES
    )
    x, y = "seconds of training", "held-out loss, nats a token"
    return [
        Chart("the race", x, y, lines, high=max(ends) + 1.5),
        Chart("its end", x, y, lines, high=max(ends) + 0.2),
    ]
