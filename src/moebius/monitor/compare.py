"""Several runs on one page, and as rows of figures: what `moebius compare` shows.

Curves overlay by step, tokens or seconds; recipes are compared field by field with the first run.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moebius.config import differences, flatten
from moebius.monitor.page import Choice, Plot, Section, escape, render, table
from moebius.monitor.plots import (
    COLOURS,
    Line,
    key,
    layout,
    mean,
    over_layers,
    points,
    smoothed,
    thin,
    trace,
)
from moebius.monitor.runs import RunRecord, open_run
from moebius.monitor.text import (
    BASELINES,
    count,
    decimal,
    duration,
    number,
    printable,
    significant,
    whole,
)

_AXES = {"step": "steps", "tokens": "tokens", "seconds": "seconds"}
_FIGURES: Mapping[str, Callable[[float | None], str]] = {
    "steps": whole,
    "tokens": count,
    "seconds": duration,
    "loss": decimal,
    "val_bits_per_byte": decimal,
    **dict.fromkeys(BASELINES, decimal),
    "params_total": count,
    "params_active_mean": count,
    "tokens_per_second": count,
    "load_cv": significant,
    "ffn_mean": significant,
    "skipped_steps": whole,
}


def compare_rows(run_folders: Sequence[Path]) -> list[dict[str, Any]]:
    """One row of final figures a run, in the order given; what a run lacks is None.

    `loss`, `load_cv` (worst layer) and `ffn_mean` (mean of layers) are those of the last line.
    """
    return [_row(run) for run in _open(run_folders)]


def write_comparison(run_folders: Sequence[Path], out: Path) -> Path:
    """Write a page that overlays the runs to `out`; ValueError if one is not a run folder."""
    runs = _open(run_folders)
    names = _labels(runs)
    title = "Comparison of " + ", ".join(names)
    head = f"<h1>Comparison of {len(runs)} runs</h1>{_summary(runs, names)}"
    sections = [
        Section("Learning", "", _overlays(runs, names, _LEARNING)),
        Section("Speed", "", _overlays(runs, names, _SPEED)),
        Section("Router", "", _overlays(runs, names, _ROUTER)),
        Section(
            "Recipes", "Fields in which a recipe differs from the first.", _recipes(runs, names)
        ),
    ]
    out.write_text(render(printable(title), head, sections), encoding="utf-8")
    return out


def _open(run_folders: Sequence[Path]) -> list[RunRecord]:
    if not run_folders:
        raise ValueError("nothing to compare; name one or more run folders")
    return [open_run(folder) for folder in run_folders]


def _labels(runs: Sequence[RunRecord]) -> list[str]:
    """Names of the runs; the folders' paths where two runs are called the same."""
    names = [printable(run.name) for run in runs]
    paths = [printable(str(run.folder)) for run in runs]
    pairs = zip(names, paths, strict=True)
    return [path if names.count(name) > 1 else name for name, path in pairs]


def _row(run: RunRecord) -> dict[str, Any]:
    last = run.lines[-1] if run.lines else {}
    found = {**last, **run.info, **(run.summary or {})}
    row: dict[str, Any] = {
        "name": run.name,
        "folder": str(run.folder),
        "state": "stopped" if run.summary is None else "finished",
        **{name: number(found, name) for name in _FIGURES},
    }
    return row | {
        "steps": number(last, "step"),
        "loss": number(last, "loss"),
        "load_cv": over_layers("load_cv", max)(last),
        "ffn_mean": over_layers("ffn_mean", mean)(last),
        "skipped_steps": number(found, "skipped_steps") or number(last, "skipped"),
    }


def _summary(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    rows = [_row(run) for run in runs]
    shown = [name for name in _FIGURES if any(row[name] is not None for row in rows)]
    body = [
        (name.replace("_", " "), *(_FIGURES[name](row[name]) for row in rows)) for name in shown
    ]
    return table(("", *names), [("state", *(row["state"] for row in rows)), *body])


def _overlays(
    runs: Sequence[RunRecord], names: Sequence[str], wanted: Sequence[tuple[Any, ...]]
) -> tuple[Plot, ...]:
    made = (_overlay(runs, names, *item) for item in wanted)
    return tuple(plot for plot in made if plot is not None)


def _overlay(
    runs: Sequence[RunRecord],
    names: Sequence[str],
    title: str,
    note: str,
    value: Callable[[Line], float | None],
    unit: str,
    smooth: bool,
) -> Plot | None:
    """One curve a run, with buttons that choose the horizontal axis."""
    curves: dict[str, list[dict[str, Any]]] = {axis: [] for axis in _AXES}
    for axis, made in curves.items():
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            series = points(run.lines, value, axis)
            series = smoothed(series, len(series[0]) // 40) if smooth else series
            line = trace(name, thin(series), COLOURS[i % len(COLOURS)])
            made += [] if line is None else [line]
    full = {axis: made for axis, made in curves.items() if len(made) == len(curves["step"]) > 0}
    if not full:
        return None
    choices = tuple(
        Choice(
            _AXES[axis],
            {"x": [line["x"] for line in made], "y": [line["y"] for line in made]},
            {"xaxis.title.text": axis, "xaxis.autorange": True, "yaxis.autorange": True},
        )
        for axis, made in full.items()
    )
    return Plot(title, note, full["step"], layout(unit, traces=len(runs)), "buttons", choices)


_LEARNING = (
    ("Training loss", "Moving mean.", key("loss"), "nats / token", True),
    ("Bits per byte", "Moving mean, of training text.", key("bits_per_byte"), "bits / byte", True),
    ("Learning rate", "", key("lr"), "learning rate", False),
    ("Gradient norm", "Moving mean, before clipping.", key("grad_norm"), "L2 norm", True),
)
_SPEED = (
    ("Throughput", "Moving mean.", key("tokens_per_second"), "tokens / s", True),
    ("Model FLOP utilisation", "Moving mean.", key("mfu"), "MFU", True),
)
_ROUTER = (
    (
        "Load variation",
        "CV of the load, mean of layers.",
        over_layers("load_cv", mean),
        "CV",
        False,
    ),
    ("Worst layer", "CV of the load, worst layer.", over_layers("load_cv", max), "CV", False),
    (
        "FFN experts per token",
        "Mean of layers.",
        over_layers("ffn_mean", mean),
        "experts",
        False,
    ),
)


def _recipes(runs: Sequence[RunRecord], names: Sequence[str]) -> tuple[str, ...]:
    recipes = [run.info.get("run") for run in runs]
    found = (text for recipe in recipes[1:] for text in differences(recipes[0], recipe))
    paths = sorted({text.partition(": ")[0] for text in found})
    if not paths:
        return (f'<p class="quiet">{escape("The recipes are the same.")}</p>',)
    leaves = [flatten(recipe) for recipe in recipes]
    rows = [(path, *(printable(str(leaf.get(path, "-"))) for leaf in leaves)) for path in paths]
    return (table(("field", *names), rows),)
