"""Charts of an experiment: one SVG file for documents, one interactive page for people.

A chart is data, lines with marked points; both forms are drawn from it. The SVG is written by hand,
has no background, and greys that are read on light and on dark.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from moebius.checkpoint.files import replace_file
from moebius.monitor.page import Plot, Section, escape, render
from moebius.monitor.plots import COLOURS, layout

WIDTH, HEIGHT, LEGEND = 400, 300, 26
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 40
INK, RULE = "#737982", "#8c929b55"


@dataclasses.dataclass(frozen=True)
class Line:
    """Points in the order of x; lines of one name have one colour in every chart."""

    name: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    # Points to stand out, such as an optimum or a finish.
    marks: tuple[tuple[float, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines over one pair of axes; `high` cuts the y axis where lines run away."""

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    log_x: bool = False
    high: float | None = None


def write_charts(stem: Path, title: str, note: str, charts: Sequence[Chart]) -> tuple[Path, Path]:
    """Write STEM.html and STEM.svg; their paths."""
    page, picture = stem.with_suffix(".html"), stem.with_suffix(".svg")
    plots = tuple(_plot(chart, _colours(charts)) for chart in charts)
    html = render(title, f"<h1>{escape(title)}</h1>", [Section("Result", note, plots)])
    replace_file(page, [html.encode()])
    replace_file(picture, [svg(charts).encode()])
    return page, picture


def _colours(charts: Iterable[Chart]) -> dict[str, str]:
    names = dict.fromkeys(line.name for chart in charts for line in chart.lines)
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _plot(chart: Chart, colours: dict[str, str]) -> Plot:
    """A chart for plotly."""
    data = []
    names: set[str] = set()
    for line in chart.lines:
        base = {"type": "scatter", "name": escape(line.name), "legendgroup": line.name}
        base["hovertemplate"] = "%{x:.5~g}, %{y:.5~g}"
        colour = colours[line.name]
        data.append(
            {
                **base,
                "mode": "lines+markers",
                "x": list(line.xs),
                "y": list(line.ys),
                "line": {"color": colour, "width": 1.6},
                "marker": {"size": 4},
                "showlegend": line.name not in names,
            }
        )
        names.add(line.name)
        if line.marks:
            xs, ys = zip(*line.marks, strict=True)
            marker = {"color": colour, "size": 12, "symbol": "star"}
            more = {"mode": "markers", "x": list(xs), "y": list(ys), "showlegend": False}
            data.append({**base, **more, "marker": marker})
    look = layout(escape(chart.y), escape(chart.x), traces=max(2, len(chart.lines)))
    look["hovermode"] = "closest"
    if chart.log_x:
        look["xaxis"] |= {"type": "log", "dtick": "D2", "tickformat": "~g"}
    if chart.high is not None:
        look["yaxis"]["range"] = list(_spans(chart)[1])
    return Plot(chart.title, "", data, look)


# --- svg ------------------------------------------------------------------------------------------


def svg(charts: Sequence[Chart]) -> str:
    """Charts side by side under one legend, y axes alike where they measure and cut the same."""
    colours = _colours(charts)
    width, height = WIDTH * len(charts), HEIGHT + LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="ui-sans-serif,system-ui,sans-serif" font-size="11" '
        f'fill="{INK}">',
        # What runs out of a panel is cut, not bent.
        f'<clipPath id="panel"><rect x="{LEFT - 6}" y="{TOP}" width="{WIDTH - LEFT}" '
        f'height="{HEIGHT - TOP - BOTTOM + 6}"/></clipPath>',
    ]
    for i, chart in enumerate(charts):
        like = (other for other in charts if (other.y, other.high) == (chart.y, chart.high))
        spans = [_spans(other)[1] for other in like]
        span = (min(low for low, _ in spans), max(high for _, high in spans))
        parts.append(f'<g transform="translate({i * WIDTH},{LEGEND})">')
        parts += _panel(chart, _spans(chart)[0], span, colours)
        parts.append("</g>")
    x = float(LEFT)
    for name, colour in colours.items():
        parts.append(f'<circle cx="{x:.0f}" cy="12" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 9:.0f}" y="16">{escape(name)}</text>')
        x += 26 + 6.2 * len(name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    chart: Chart,
    x_span: tuple[float, float],
    y_span: tuple[float, float],
    colours: dict[str, str],
) -> Iterable[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = _share(x, x_span, chart.log_x) * (right - LEFT)
        return LEFT + across, bottom - _share(y, y_span, log=False) * (bottom - TOP)

    yield f'<text x="{LEFT}" y="16" font-weight="600">{escape(chart.title)}</text>'
    for tick in ticks(*y_span):
        _, y = place(x_span[0], tick)
        yield f'<path d="M{LEFT} {y:.1f}H{right}" stroke="{RULE}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>'
    for tick in log_ticks(*x_span) if chart.log_x else ticks(*x_span):
        x, _ = place(tick, y_span[0])
        yield f'<path d="M{x:.1f} {bottom}v4" stroke="{INK}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.6g}</text>'
    yield f'<path d="M{LEFT} {bottom}H{right}" stroke="{INK}"/>'
    middle = (LEFT + right) / 2
    yield f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(chart.x)}</text>'
    turned = f'transform="translate(12,{(TOP + bottom) / 2}) rotate(-90)"'
    yield f'<text {turned} text-anchor="middle">{escape(chart.y)}</text>'
    yield '<g clip-path="url(#panel)">'
    for line in chart.lines:
        colour = colours[line.name]
        points = [place(x, y) for x, y in zip(line.xs, line.ys, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        for x, y in points if len(points) <= 40 else ():
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}"/>'
        for x, y in (place(*mark) for mark in line.marks):
            ring = f'fill="none" stroke="{colour}" stroke-width="2"'
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" {ring}/>'
    yield "</g>"


def _spans(chart: Chart) -> tuple[tuple[float, float], tuple[float, float]]:
    """What both axes show, with a little room; `high` cuts y."""
    xs = [x for line in chart.lines for x in (*line.xs, *(mark[0] for mark in line.marks))]
    ys = [y for line in chart.lines for y in (*line.ys, *(mark[1] for mark in line.marks))]
    if not xs:
        raise ValueError(f"the chart {chart.title!r} has no points; nothing finite was measured")
    low, high = min(ys), max(ys)
    high = high if chart.high is None else min(high, chart.high)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    x_room = 1.1 if chart.log_x else 0.0
    left, right = (min(xs) / x_room, max(xs) * x_room) if chart.log_x else (min(xs), max(xs))
    return (left, right), (low - room, high + room)


def _share(value: float, span: tuple[float, float], log: bool) -> float:
    low, high = (math.log(end) for end in span) if log else span
    return ((math.log(value) if log else value) - low) / (high - low or 1.0)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within a span, in steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within a span."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = (n * 10.0**power for power in powers for n in (1, 2, 5))
    return [tick for tick in found if low <= tick <= high]
