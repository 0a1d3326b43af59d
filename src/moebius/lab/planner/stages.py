"""How units of layers are dealt to pipeline stages, and what of a schedule stays idle.

Embedding and head count as units, so that a first or last chunk may hold nothing else (Llama 3,
3.3.2). With V chunks a rank holds every PP-th chunk; the idle share of interleaved 1F1B is
(PP - 1) / (V * M). DualPipe's is that of DeepSeek-V3, table 2.
"""

import dataclasses
from collections import Counter
from typing import Literal

from moebius.lab.planner.shape import Part, Shape
from moebius.model.stage import cuts_of

Schedule = Literal["interleaved", "dualpipe"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The parts on a rank with how often they stand there; `rank` is the first with just these."""

    rank: int
    parts: tuple[tuple[Part, int], ...]


def stages_of(shape: Shape, pp: int, chunks: int) -> tuple[Stage, ...]:
    """The ranks of a pipeline, equal ones once (the first, which holds most in flight)."""
    cuts = cuts_of([part.weight for part in shape.parts], pp * chunks)
    found: dict[tuple[tuple[Part, int], ...], int] = {}
    for rank in range(pp):
        own: Counter[Part] = Counter()
        for chunk in range(rank, pp * chunks, pp):
            own.update(shape.parts[cuts[chunk] : cuts[chunk + 1]])
        found.setdefault(tuple(own.items()), rank)
    return tuple(Stage(rank, parts) for parts, rank in found.items())


def idle(schedule: Schedule, pp: int, chunks: int, forward: float, backward: float) -> float:
    """Seconds of a step that a rank waits, from a micro-batch's seconds on it."""
    if schedule == "interleaved" or pp < 4:
        return (pp - 1) / chunks * (forward + backward)
    # F&B + B - 3W, its weight gradient W being half of B.
    return (pp / 2 - 1) * max(0.0, forward + backward + backward - 1.5 * backward)


def in_flight(schedule: Schedule, pp: int, chunks: int, rank: int, micro: int) -> float:
    """Micro-batches whose activations a rank holds at once."""
    if pp == 1:
        return 1.0
    if schedule == "dualpipe":
        return float(min(micro, pp + 1))
    if chunks == 1:
        return float(min(micro, pp - rank))
    warm = 2 * (pp - rank - 1) + (chunks - 1) * pp + 1
    return min(micro * chunks, warm) / chunks
