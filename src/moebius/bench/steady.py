"""`moebius bench steady`: hundreds of steps of one model, window by window: time and memory held.

What is to be read off: the last window is no slower than the first, and nothing grows.
"""

import math
import statistics
from typing import Any

from moebius.bench.child import Child
from moebius.bench.ours import SPEC
from moebius.bench.settled import opened, settled
from moebius.bench.timing import machine
from moebius.config import to_json
from moebius.train.precision import DTYPES
from moebius.train.run import Run
from moebius.train.session import Progress


def bench_steady(
    run: Run, *, steps: int = 500, every: int = 50, progress: Progress | None = None
) -> dict[str, Any]:
    """Time `steps` steps; a row for every `every` of them, and how the last compares to the first.

    A window agrees if every loss in it is finite.
    """
    if not 1 <= every <= steps:
        raise ValueError(f"every ({every}) must lie in 1..{steps}, the steps")
    loader, device = opened(run, progress)
    run, errors, used = settled(run, loader, device)
    found: list[dict[str, Any]] = []
    with Child(SPEC, to_json(run), None) as child:
        for i in range(steps):
            found.append(child.step())
            if progress is not None:
                progress("steps", i + 1, steps)
    starts = range(0, steps - every + 1, every)
    rows = [_window(start, found[start : start + every], run) for start in starts]
    # The first steps of a process build up what the others only use.
    first, last = rows[min(1, len(rows) - 1)], rows[-1]
    slower = last["seconds"] / first["seconds"]
    grown = (last["resident_bytes"] or 0) - (first["resident_bytes"] or 0)
    note = (
        f"{last['name']} against {first['name']}: {slower:.3f} of the time, {grown:+,} bytes held"
    )
    return {
        **machine(device, DTYPES[run.precision], run.matmul_flops),
        "in_use": used,
        "errors": errors,
        "slower": slower,
        "grown_bytes": grown,
        "notes": [note],
        "rows": rows,
    }


def _window(start: int, steps: list[dict[str, Any]], run: Run) -> dict[str, Any]:
    seconds = statistics.median(step["seconds"] for step in steps)
    peaks = [step["peak_memory_bytes"] for step in steps]
    return {
        "name": f"steps {start}-{start + len(steps) - 1}",
        "seconds": seconds,
        "tokens_per_second": run.tokens_per_step() / seconds,
        "peak_memory_bytes": None if None in peaks else max(peaks),
        "resident_bytes": steps[-1]["resident_bytes"],
        "loss": statistics.fmean(step["loss"] for step in steps),
        "agrees": all(math.isfinite(step["loss"]) for step in steps),
    }
