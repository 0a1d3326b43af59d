"""The plots of a run's metrics, as plain plotly figures; a plot without data is left out (None).

Long series are thinned to at most 2,000 points a trace, keeping the lowest and the highest point of
every stretch, so that a spike never disappears.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from moebius.monitor.page import Plot, escape
from moebius.monitor.text import number

Line = Mapping[str, Any]
Points = tuple[list[float], list[float]]

MAX_POINTS = 2000
_PAGE_POINTS = 40_000
_MANY = 10
_FEW_DECADES = 3

COLOURS = (
    "#3f7fd1",
    "#e07a3f",
    "#2ca58d",
    "#b65fcf",
    "#c9a227",
    "#d1495b",
    "#6f9a35",
    "#7a8aa0",
)
_DEPTH = ((63, 127, 209), (44, 165, 141), (201, 162, 39), (209, 73, 91))


def points(lines: Iterable[Line], value: Callable[[Line], float | None], x: str = "step") -> Points:
    """The series of a value over the lines that have it as a finite number."""
    found = [(number(line, x), value(line)) for line in lines]
    kept = [(a, b) for a, b in found if a is not None and b is not None]
    return [a for a, _ in kept], [b for _, b in kept]


def key(name: str, *path: str) -> Callable[[Line], float | None]:
    """Reads `line[path...][name]`, None where anything on the way is missing."""

    def read(line: Line) -> float | None:
        inner: Any = line
        for part in path:
            inner = inner.get(part) or {}
        return number(inner, name)

    return read


def layers_of(lines: Sequence[Line]) -> list[str]:
    """The keys of the MoE layers, in depth order."""
    names = {layer for line in lines for layer in line.get("layers") or {}}
    return sorted(names, key=lambda name: (len(name), name))


def over_layers(name: str, fold: Callable[[list[float]], float]) -> Callable[[Line], float | None]:
    """Reads `name` of every layer of a line and folds the values (a mean, a maximum)."""

    def read(line: Line) -> float | None:
        values = [number(stats, name) for stats in (line.get("layers") or {}).values()]
        known = [value for value in values if value is not None]
        return fold(known) if known else None

    return read


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def thin(series: Points, limit: int = MAX_POINTS) -> Points:
    """At most `limit` points: both ends, and the extremes of each of equal stretches between."""
    xs, ys = series
    if len(xs) <= limit:
        return xs, ys
    size = math.ceil((len(xs) - 2) / max(1, (limit - 2) // 2))
    chosen = {0, len(xs) - 1}
    for start in range(1, len(xs) - 1, size):
        stretch = range(start, min(start + size, len(xs) - 1))
        chosen |= {min(stretch, key=ys.__getitem__), max(stretch, key=ys.__getitem__)}
    order = sorted(chosen)
    return [xs[i] for i in order], [ys[i] for i in order]


def trace(name: str, series: Points, colour: str, limit: int = MAX_POINTS) -> dict[str, Any] | None:
    """A line of a plot; None where the series is empty. `name` is plain text."""
    if not series[0]:
        return None
    xs, ys = thin(series, limit)
    return {
        "type": "scatter",
        "mode": "lines" if len(xs) > 1 else "markers",
        "name": escape(name),
        "x": xs,
        "y": [rounded(y) for y in ys],
        "line": {"color": colour, "width": 1.6},
        "hovertemplate": "%{y:.5~g}",
    }


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def depth_colour(index: int, total: int) -> str:
    """A colour for a layer: blue near the input, red near the output."""
    place = (len(_DEPTH) - 1) * index / max(1, total - 1)
    low = min(int(place), len(_DEPTH) - 2)
    share = place - low
    mixed = (a + (b - a) * share for a, b in zip(_DEPTH[low], _DEPTH[low + 1], strict=True))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def faded(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def layout(
    y: str, x: str = "step", log: Literal["", "plain", "powers"] = "", traces: int = 1
) -> dict[str, Any]:
    """The look all plots share. Many traces are hovered one by one."""
    return {
        "height": 300,
        "margin": {"l": 56, "r": 12, "t": 34 if traces > 1 else 12, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "x unified" if traces <= _MANY else "closest",
        "showlegend": 1 < traces <= 24,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {
            "title": {"text": x},
            "showgrid": False,
            "showline": True,
            "zeroline": False,
            "ticks": "outside",
        },
        "yaxis": {
            "title": {"text": y},
            "type": "log" if log else "linear",
            "zeroline": False,
            "automargin": True,
            "nticks": 6,
            **({"dtick": "D2", "tickformat": "~g" if log == "plain" else ".0e"} if log else {}),
        },
    }


def curves(
    title: str,
    note: str,
    series: Mapping[str, Points],
    y: str,
    colours: Sequence[str] = COLOURS,
    log: Literal["", "plain", "powers"] = "",
) -> Plot | None:
    """Series over steps, one line each, by name."""
    limit = min(MAX_POINTS, _PAGE_POINTS // max(1, len(series)))
    made = [
        trace(name, found, colours[i % len(colours)], limit)
        for i, (name, found) in enumerate(series.items())
    ]
    data = [item for item in made if item is not None]
    if not data:
        return None
    look = layout(y, log=log, traces=len(data))
    if log and _decades(series.values()) > _FEW_DECADES:
        look["yaxis"]["dtick"] = 1
    return Plot(title, note, data, look)


def _decades(series: Iterable[Points]) -> float:
    values = [y for _, ys in series for y in ys if y > 0]
    return math.log10(max(values) / min(values)) if values else 0.0


def by_layer(title: str, note: str, lines: Sequence[Line], name: str, y: str) -> Plot | None:
    """One line a MoE layer for `name`, coloured by depth."""
    layers = layers_of(lines)
    series = {f"layer {i}": points(lines, key(name, "layers", i)) for i in layers}
    return curves(title, note, series, y, depth_colours(len(layers)))


def depth_colours(total: int) -> list[str]:
    return [depth_colour(i, total) for i in range(total)] or list(COLOURS)


def smoothed(series: Points, span: int) -> Points:
    """The mean over `span` neighbours centred on each point, over fewer near both ends."""
    xs, ys = series
    sums = [0.0, *itertools.accumulate(ys)]
    out: list[float] = []
    for i in range(len(ys)):
        before = min(i, span // 2)
        end = min(len(ys), i + 1 + (before if i < span // 2 else span // 2))
        out.append((sums[end] - sums[i - before]) / (end - i + before))
    return xs, out


def with_trend(
    title: str, note: str, series: Points, y: str, levels: Mapping[str, float] | None = None
) -> Plot | None:
    """A noisy series, faint, with its moving mean; `levels` are named horizontal lines."""
    raw = trace("each step", series, faded(COLOURS[0], 0.45))
    if raw is None:
        return None
    trend = trace("moving mean", smoothed(series, len(series[0]) // 40), COLOURS[0])
    data = [item for item in (raw, trend) if item is not None]
    for i, (name, level) in enumerate((levels or {}).items()):
        ends = [series[0][0], series[0][-1]]
        line = trace(name, (ends, [level, level]), COLOURS[1 + i])
        if line is not None:
            line["line"]["dash"] = "dot"
            line["mode"] = "lines"
            data.append(line)
    return Plot(title, note, data, layout(y, traces=len(data)))


def band(low: Points, high: Points, name: str, colour: str) -> list[dict[str, Any]]:
    """Two traces with the space between them filled; empty where there is nothing to fill."""
    limit = MAX_POINTS // 2
    under, over = trace(name, low, faded(colour, 0.5), limit), trace(name, high, colour, limit)
    if under is None or over is None:
        return []
    for edge in (under, over):
        edge |= {"legendgroup": name, "line": {"color": faded(colour, 0.8), "width": 1}}
    under["showlegend"] = False
    over |= {"fill": "tonexty", "fillcolor": faded(colour, 0.1)}
    return [under, over]
