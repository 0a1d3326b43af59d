"""The report of one run: `report.html`, a self-contained page, also while the run goes on.

What a run folder lacks is left out of the page. Names, samples and tokens are strangers' text and
are escaped wherever they appear.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moebius.monitor.page import Plot, Section, escape, folded, render, table
from moebius.monitor.router_plots import ffn_over_time, ffn_spread
from moebius.monitor.run_plots import learning, router, speed, stability
from moebius.monitor.runs import RunRecord, open_run
from moebius.monitor.text import (
    BASELINES,
    count,
    decimal,
    duration,
    number,
    percent,
    printable,
    whole,
)
from moebius.monitor.tokens import token_parts

_MAX_NOTES = 200


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path; ValueError if it is not a run."""
    run = open_run(run_folder)
    path = run_folder / "report.html"
    path.write_text(render(run.name, _head(run), _sections(run)), encoding="utf-8")
    return path


def _sections(run: RunRecord) -> list[Section]:
    lines = run.lines
    return [
        Section("Alarms and events", "", (_notes(run),)),
        Section("Learning", "How well the model predicts its text.", _some(learning(run))),
        Section(
            "Router",
            "Whether every expert gets its part of the work.",
            _some(router(lines)),
        ),
        Section(
            "Computation per token",
            "With zero-computation experts, easy tokens may use fewer FFN experts than hard ones.",
            (*_some([ffn_over_time(lines), ffn_spread(lines)]), *token_parts(run.tokens)),
        ),
        Section("Stability", "Early signs of trouble.", _some(stability(lines))),
        Section("Speed", "", _some(speed(lines))),
        Section("Sample", "Written by the model at the end of the run.", _sample(run)),
        Section("Details", "", _details(run)),
    ]


def _some(plots: Sequence[Plot | None]) -> tuple[Plot, ...]:
    return tuple(plot for plot in plots if plot is not None)


# --- head -----------------------------------------------------------------------------------------


def _head(run: RunRecord) -> str:
    last = run.lines[-1] if run.lines else {}
    step = whole(number(last, "step"))
    state = "finished" if run.summary is not None else f"in progress or stopped at step {step}"
    found = {**last, **run.info, **(run.summary or {})}
    commit = str(run.info.get("commit") or "")[:12]
    about = [state, str(found.get("precision") or ""), f"commit {commit}" if commit else ""]
    return (
        f"<h1>{escape(printable(run.name))}</h1>"
        f'<p class="sub">{" &middot; ".join(escape(text) for text in about if text)}</p>'
        f'<dl class="figures">{"".join(_figure(*item) for item in _figures(found))}</dl>'
        f"{_bars(found)}"
    )


def _figures(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    low, high = number(found, "params_active_min"), number(found, "params_active_max")
    spread = f"{count(low)} to {count(high)} a token" if low != high else ""
    val = number(found, "val_bits_per_byte")
    step = number(found, "steps") or number(found, "step")
    skipped = number(found, "skipped_steps") or number(found, "skipped") or 0
    figures = [
        ("validation bits/byte", decimal(val), ""),
        ("training loss", decimal(number(found, "loss")), ""),
        ("active parameters", count(number(found, "params_active_mean")), spread),
        ("total parameters", count(number(found, "params_total")), ""),
        ("tokens", count(number(found, "tokens")), f"{whole(step)} steps" if step else ""),
        ("tokens/s", count(number(found, "tokens_per_second")), ""),
        ("MFU", percent(number(found, "mfu")), ""),
        ("time", duration(number(found, "seconds")), ""),
        ("skipped updates", whole(skipped or None), "not finite"),
    ]
    return [item for item in figures if item[1] != "-"]


def _figure(name: str, value: str, more: str) -> str:
    small = f"<small>{escape(more)}</small>" if more else ""
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{small}</dd></div>"


def _bars(found: Mapping[str, Any]) -> str:
    """The model's bits per byte beside the compressors', as bars; shorter is better."""
    names = {"val_bits_per_byte": "this model", **BASELINES}
    known = {name: number(found, field) for field, name in names.items()}
    values = {name: value for name, value in known.items() if value is not None}
    if "this model" not in values or len(values) < 2:
        return ""
    top = max(values.values()) or 1.0
    rows = (
        f"<span>{escape(name)}</span>"
        f'<i class="{"ours" if name == "this model" else "theirs"}" '
        f'style="width:{100 * value / top:.1f}%"></i><span>{value:.3f}</span>'
        for name, value in sorted(values.items(), key=lambda item: item[1])
    )
    note = '<p class="sub">Bits per byte of the same validation text; shorter is better.</p>'
    return f'<div class="bars">{"".join(rows)}</div>{note}'


# --- sections -------------------------------------------------------------------------------------


def _notes(run: RunRecord) -> str:
    rows = [(event.get("step"), event.get("kind"), event.get("message")) for event in run.events]
    told = {(step, message) for step, _, message in rows}
    for line in run.lines:
        alarms = [(line["step"], text) for text in line.get("alarms") or ()]
        rows += [(step, "alarm", text) for step, text in alarms if (step, text) not in told]
    rows.sort(key=lambda row: row[0] if isinstance(row[0], int | float) else -1)
    if not rows:
        return '<p class="quiet">None.</p>'
    cells = [tuple(printable(str("" if x is None else x)) for x in row) for row in rows]
    left = len(cells) - _MAX_NOTES
    more = f'<p class="quiet">... and {left} more in the run folder.</p>' if left > 0 else ""
    alarms = sum(row[1] == "alarm" for row in cells)
    head = f'<p class="alarm">{alarms} alarms</p>' if alarms else ""
    return head + table(("step", "kind", "message"), cells[:_MAX_NOTES]) + more


def _sample(run: RunRecord) -> tuple[str, ...]:
    sample = (run.summary or {}).get("sample")
    return (f"<pre>{escape(printable(str(sample)))}</pre>",) if sample else ()


def _details(run: RunRecord) -> tuple[str, ...]:
    parts = [folded("Recipe", _pretty(run.info.get("run")))]
    parts.append(folded("Versions", _pretty(run.info.get("versions"))))
    figures = {name: x for name, x in (run.summary or {}).items() if name != "sample"}
    if figures:
        parts.append(table(("summary", ""), [(name, _plain(x)) for name, x in figures.items()]))
    if run.torn:
        torn = escape(", ".join(run.torn))
        parts.append(f'<p class="foot">Left out: a torn last line of {torn}.</p>')
    parts.append(f'<p class="foot">{len(run.lines)} logged steps in {escape(str(run.folder))}</p>')
    return tuple(parts)


def _pretty(data: Any) -> str:
    return printable(json.dumps(data, indent=2, ensure_ascii=False))


def _plain(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else value
    return printable(text if isinstance(text, str) else json.dumps(text))
