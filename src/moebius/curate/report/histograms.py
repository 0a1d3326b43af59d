"""Lengths, languages and scores before and after, as plotly figures estimated from samples.

"Before" are all documents as they were when they left: the kept ones, and the dropped ones as they
were when dropped. A sampled row stands for as many documents as its folder has for each sampled.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moebius.curate.report.counted import Counted
from moebius.curate.report.sample import Light, Sample
from moebius.curate.report.words import shortened
from moebius.monitor.page import Choice, Plot, escape
from moebius.monitor.plots import COLOURS, layout, rounded
from moebius.monitor.text import printable

_BEFORE, _AFTER = "#a9a49a", COLOURS[0]
_MAX_LANGUAGES, _MAX_SCORES, _BINS = 24, 16, 40


@dataclass(frozen=True)
class Population:
    """Sampled rows, each of which stands for `weight` documents."""

    rows: Sequence[Light]
    weight: float


def populations(
    counted: Counted, kept: Sample, dropped: Sequence[Sample]
) -> tuple[list[Population], list[Population]]:
    """All documents as they left, and the kept ones alone."""
    after = [_population(kept, counted.kept.documents)]
    lost = [
        _population(sample, step.dropped_all.documents)
        for step, sample in zip(counted.steps, dropped, strict=True)
    ]
    return [*after, *lost], after


def _population(sample: Sample, documents: int) -> Population:
    return Population(sample.rows, documents / len(sample.rows) if sample.rows else 0.0)


def histograms(before: list[Population], after: list[Population]) -> list[Plot]:
    """Every figure that has data."""
    if not any(part.rows for part in before):
        return []
    plots = [lengths(before, after), languages(before, after)]
    names = sorted({name for part in before for row in part.rows for name in row.scores})
    plots += [_scores(name, before, after) for name in names[:_MAX_SCORES]]
    return [plot for plot in plots if plot is not None]


# --- lengths --------------------------------------------------------------------------------------


def lengths(before: list[Population], after: list[Population]) -> Plot | None:
    """Documents by size, a bin for each power of two."""
    edges = range(0, 29)

    def place(row: Light) -> int:
        return min(len(edges) - 1, max(0, math.floor(math.log2(max(1, row.num_bytes)))))

    each = {
        "documents": [_binned(side, place, len(edges)) for side in (before, after)],
        "bytes": [
            _binned(side, place, len(edges), lambda row: row.num_bytes) for side in (before, after)
        ],
    }
    used = [i for i in edges if any(values[i] for values in each["documents"])]
    if not used:
        return None
    span = range(used[0], used[-1] + 1)
    names = [f"{_power(i)} to {_power(i + 1)}" for i in span]
    series = {name: [[v[i] for i in span] for v in sides] for name, sides in each.items()}
    look = layout("documents", "size of the text", traces=2)
    look["xaxis"] |= {"type": "category", "tickangle": -35, "automargin": True}
    choices = tuple(
        Choice(name, {"y": values}, {"yaxis.title.text": name}) for name, values in series.items()
    )
    return Plot(
        "Length",
        "UTF-8 bytes of a document, or of the raw page where it was dropped as one.",
        _bars([_power(i) for i in span], *series["documents"], hover=names),
        {**look, **_OVERLAY},
        "buttons",
        choices,
    )


def _power(exponent: int) -> str:
    value, unit = 1 << (exponent % 10), ("B", "KiB", "MiB")[min(2, exponent // 10)]
    return f"{value} {unit}"


# --- languages ------------------------------------------------------------------------------------


def languages(before: list[Population], after: list[Population]) -> Plot | None:
    """Documents by language, the most frequent ones."""
    sides: list[dict[str, float]] = []
    for side in (before, after):
        found: dict[str, float] = {}
        for part in side:
            for row in part.rows:
                name = row.language or "unknown"
                found[name] = found.get(name, 0.0) + part.weight
        sides.append(found)
    names = sorted(sides[0], key=lambda name: (-sides[0][name], name))[:_MAX_LANGUAGES]
    if not names:
        return None
    look = layout("documents", "language", traces=2)
    look["xaxis"] |= {"type": "category", "tickangle": -35, "automargin": True}
    values = [[rounded(side.get(name, 0.0)) for name in names] for side in sides]
    shown = [escape(printable(shortened(name, 24))) for name in names]
    return Plot(
        "Language",
        "As the documents are labelled when they leave.",
        _bars(shown, values[0], values[1]),
        {**look, **_OVERLAY},
        "buttons",
        (
            Choice("linear", {}, {"yaxis.type": "linear", "yaxis.dtick": None}),
            Choice("log axis", {}, {"yaxis.type": "log", "yaxis.dtick": 1}),
        ),
    )


# --- scores ---------------------------------------------------------------------------------------


def _scores(name: str, before: list[Population], after: list[Population]) -> Plot | None:
    """Documents by one score, for those that have it."""
    values = [row.scores[name] for part in before for row in part.rows if name in row.scores]
    low, high = min(values), max(values)
    step = (high - low) / _BINS
    if not step or not math.isfinite(step):
        return None

    def place(row: Light) -> int | None:
        if name not in row.scores:
            return None
        return min(_BINS - 1, int((row.scores[name] - low) / step))

    sides = [_binned(side, place, _BINS) for side in (before, after)]
    look = layout("documents", "score", traces=2)
    centres = [rounded(low + (i + 0.5) * step) for i in range(_BINS)]
    title = printable(shortened(name, 60))
    return Plot(
        f"Score: {title}",
        "Of the documents that have it.",
        _bars(centres, sides[0], sides[1]),
        {**look, **_OVERLAY},
    )


# --- drawing --------------------------------------------------------------------------------------

_OVERLAY: dict[str, Any] = {"barmode": "overlay", "bargap": 0.06, "height": 280}


def _binned(
    side: list[Population],
    place: Callable[[Light], int | None],
    bins: int,
    value: Callable[[Light], float] = lambda row: 1.0,
) -> list[float]:
    found = [0.0] * bins
    for part in side:
        for row in part.rows:
            i = place(row)
            if i is not None:
                found[i] += part.weight * value(row)
    return [rounded(x) for x in found]


def _bars(
    x: Sequence[Any], before: list[float], after: list[float], hover: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Kept documents in front of all of them."""
    shared: dict[str, Any] = {"type": "bar", "x": list(x)}
    if hover is not None:
        shared["customdata"] = list(hover)
    told = "%{customdata}: " if hover is not None else ""
    return [
        {
            **shared,
            "name": name,
            "y": y,
            "marker": {"color": colour, "line": {"width": 0}},
            "opacity": opacity,
            "hovertemplate": told + "%{y:,.3~s}",
        }
        for name, y, colour, opacity in (
            ("before", before, _BEFORE, 0.55),
            ("kept", after, _AFTER, 0.95),
        )
    ]
