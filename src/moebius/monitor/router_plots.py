"""The plots of a run's router: load maps, effective experts, FFN experts per token, bias range.

One row of a load map is a layer, one column a router output: first the FFN experts, then the
zero-computation experts. The slider has at most 60 positions, fewer where the map is large.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moebius.monitor.page import Choice, Plot
from moebius.monitor.plots import (
    COLOURS,
    Line,
    band,
    curves,
    depth_colour,
    depth_colours,
    key,
    layers_of,
    layout,
    mean,
    over_layers,
    points,
    rounded,
)
from moebius.monitor.text import number

_MAX_FRAMES = 60
_FRAME_CELLS = 400_000
_LAST_LINES = 10
_MAX_BARS = 8


def thinned_lines(lines: Sequence[Line], limit: int) -> list[Line]:
    """At most `limit` lines at equal distances, the first and the last among them."""
    if len(lines) <= limit:
        return list(lines)
    return [lines[round(i * (len(lines) - 1) / (limit - 1))] for i in range(limit)]


def load_map(lines: Sequence[Line]) -> Plot | None:
    """Router load, layer x expert, with a slider over the steps; 1 is an even share."""
    lines = [line for line in lines if any(_field(line, "load").values())]
    if not lines:
        return None
    layers = layers_of(lines)
    width = max(len(load) for line in lines for load in _field(line, "load").values())
    fit = max(2, min(_MAX_FRAMES, _FRAME_CELLS // (width * len(layers))))
    frames = thinned_lines(lines, fit)
    grids = [_grid(_field(line, "load"), layers) for line in frames]
    values = sorted(z for grid in grids for row in grid for z in row if z is not None)
    top = min(8.0, max(2.0, values[int(0.995 * (len(values) - 1))])) if values else 2.0
    heat = _heat(grids[-1], layers)
    heat |= {
        "zmax": top,
        "colorbar": {"title": {"text": "x even"}, "thickness": 10, "outlinewidth": 0},
        "hovertemplate": "%{y}, expert %{x}: %{z:.2f} x an even share<extra></extra>",
    }
    choices = tuple(
        Choice(f"step {line['step']}", {"z": [grid]}, {})
        for line, grid in zip(frames, grids, strict=True)
    )
    last = frames[-1]["layers"]
    split = max((int(number(stats, "num_ffn") or width) for stats in last.values()), default=width)
    note = (
        "Each expert's share of all assignments, as a multiple of an even share. "
        + ("Right of the line: zero-computation experts. " if split < width else "")
        + "Move the slider through the run."
    )
    look = _map_layout(len(layers), split if split < width else None)
    return Plot("Router load", note, [heat], look, "slider", choices)


def _grid(loads: Mapping[str, Sequence[float | None]], layers: Sequence[str]) -> list[list[Any]]:
    return [
        [None if z is None else round(z * len(row), 3) for z in row]
        for row in (loads.get(layer, ()) for layer in layers)
    ]


def _heat(grid: Sequence[Sequence[float | None]], layers: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "z": grid,
        "y": [f"layer {i}" for i in layers],
        "zmin": 0,
        "colorscale": "Cividis",
        "xgap": 1 if max(map(len, grid)) <= 128 else 0,
        "ygap": 2 if len(layers) <= 32 else 0,
    }


def _map_layout(rows: int, split: int | None) -> dict[str, Any]:
    look = layout("", "expert")
    look["height"] = min(900, 110 + 30 * rows)
    look["hovermode"] = "closest"
    look["yaxis"] |= {"autorange": "reversed", "nticks": 0, "showgrid": False, "type": "category"}
    look["xaxis"] |= {"showline": False, "ticks": "", "zeroline": False}
    if split is not None:
        place = {
            "xref": "x",
            "yref": "paper",
            "x0": split - 0.5,
            "x1": split - 0.5,
            "y0": 0,
            "y1": 1,
        }
        look["shapes"] = [{"type": "line", **place, "line": {"color": "#e07a3f", "width": 2}}]
    return look


def effective_experts(lines: Sequence[Line]) -> Plot | None:
    """exp(entropy) of the load over the FFN experts, as a share of their number, a layer a line."""
    layers = layers_of(lines)
    series = {}
    for layer in layers:
        steps, found = points(lines, key("effective_experts", "layers", layer))
        sizes = dict(zip(*points(lines, key("num_ffn", "layers", layer)), strict=True))
        both = [(s, e / sizes[s]) for s, e in zip(steps, found, strict=True) if sizes.get(s)]
        series[f"layer {layer}"] = ([s for s, _ in both], [share for _, share in both])
    return curves(
        "Effective experts",
        "exp(entropy) of the load over the number of FFN experts; 1 is even, a fall is a collapse.",
        series,
        "share",
        depth_colours(len(layers)),
    )


def ffn_over_time(lines: Sequence[Line]) -> Plot | None:
    """Mean FFN experts per token, a layer a line, and the spread over tokens as one band."""
    layers = layers_of(lines)
    plot = curves(
        "FFN experts per token",
        "Mean of each layer; the grey band is one standard deviation over tokens (mean of layers).",
        {f"layer {i}": points(lines, key("ffn_mean", "layers", i)) for i in layers},
        "experts",
        depth_colours(len(layers)),
    )
    if plot is None:
        return None
    steps, middles = points(lines, over_layers("ffn_mean", mean))
    spreads = dict(zip(*points(lines, over_layers("ffn_std", mean)), strict=True))
    rows = [(s, m, spreads[s]) for s, m in zip(steps, middles, strict=True) if s in spreads]
    at = [s for s, _, _ in rows]
    low, high = [m - d for _, m, d in rows], [m + d for _, m, d in rows]
    edges = band((at, low), (at, high), "mean ± std", COLOURS[-1])
    look = layout("experts", traces=len(plot.data) + 1)
    return Plot(plot.title, plot.note, edges + plot.data, look)


def ffn_spread(lines: Sequence[Line]) -> Plot | None:
    """The share of tokens with 0..S FFN experts, mean of the last lines; a map for many layers."""
    recent = [line for line in lines if any(_field(line, "ffn_hist").values())][-_LAST_LINES:]
    if not recent:
        return None
    layers = layers_of(recent)
    shares = {
        layer: _mean_rows([_field(line, "ffn_hist").get(layer) for line in recent])
        for layer in layers
    }
    title = "Tokens by number of FFN experts"
    note = f"Share of tokens that use 0, 1, ... FFN experts; mean of the last {len(recent)} lines."
    if len(layers) > _MAX_BARS:
        heat = _heat(list(shares.values()), layers)
        heat |= {"zmax": None, "hovertemplate": "%{y}, %{x} experts: %{z:.1%}<extra></extra>"}
        heat["colorbar"] = {"tickformat": ".0%", "thickness": 10, "outlinewidth": 0}
        look = _map_layout(len(layers), None)
        look["xaxis"]["title"] = {"text": "FFN experts"}
        return Plot(title, note, [heat], look)
    bars = [
        {
            "type": "bar",
            "name": f"layer {layer}",
            "x": list(range(len(share))),
            "y": [rounded(value) for value in share],
            "marker": {"color": depth_colour(i, len(layers))},
            "hovertemplate": "%{y:.1%}",
        }
        for i, (layer, share) in enumerate(shares.items())
    ]
    look = layout("share of tokens", "FFN experts", traces=len(bars))
    look["yaxis"]["tickformat"] = ".0%"
    look["xaxis"]["dtick"] = 1
    return Plot(title, note, bars, look)


def bias_range(lines: Sequence[Line]) -> Plot | None:
    """The lowest and highest selection bias of each layer, filled between."""
    layers = layers_of(lines)
    data: list[dict[str, Any]] = []
    for i, layer in enumerate(layers):
        low = points(lines, key("bias_min", "layers", layer))
        high = points(lines, key("bias_max", "layers", layer))
        data += band(low, high, f"layer {layer}", depth_colour(i, len(layers)))
    if not data:
        return None
    note = "Lowest to highest selection bias. Wide against the scores' scale means saturated."
    return Plot("Bias range", note, data, layout("bias", traces=len(data)))


def _field(line: Line, name: str) -> dict[str, list[float]]:
    found = (line.get("layers") or {}).items()
    return {layer: stats[name] for layer, stats in found if stats.get(name)}


def _mean_rows(rows: Sequence[Sequence[float | None] | None]) -> list[float]:
    known = [row for row in rows if row]
    return [mean([value or 0.0 for value in column]) for column in zip(*known, strict=False)]
