"""The printed form of `moebius bench overlap`: a table, and a step of each block as bars."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

EXCHANGES = ("counts", "dispatch", "combine", "combine backward", "dispatch backward")
WIDTH = 64
HEAD = (
    ("block", "{name}"),
    ("overlap", "{overlap}"),
    ("ms", "{own_seconds}"),
    ("ms, delayed", "{own_seconds_delayed}"),
    ("exposed", "{own_exposed}"),
    ("wall ms", "{wall_seconds}"),
    ("wall ms, delayed", "{wall_seconds_delayed}"),
    ("error", "{error}"),
)


def lines(result: Mapping[str, Any], as_json: bool) -> list[str]:
    """A result in the form asked for: JSON, or markdown that reads well as text."""
    if as_json:
        return [json.dumps(result, indent=2)]
    setting = result["setting"]
    out = [
        f"{result['ranks']} processes (gloo, fp32), {setting['tokens']} tokens each of width "
        f"{setting['width']}, {setting['exchange']}; {len(EXCHANGES)} exchanges a step "
        f"({', '.join(EXCHANGES)}), each {setting['delay'] * 1e3:g} ms slower; medians of "
        f"{setting['repeats']}",
        "",
        f"| {' | '.join(heading for heading, _ in HEAD)} |",
        f"|{' --- |' * len(HEAD)}",
    ]
    for row in result["rows"]:
        shown = {key: _form(key, value) for key, value in row.items()}
        out.append(f"| {' | '.join(form.format(**shown) for _, form in HEAD)} |")
    out += ["", *result["notes"]]
    for name, events in result["events"].items():
        out += ["", f"{name}, forward and backward:", "```", *bars(events), "```"]
    return out


def _form(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return "-"
    if "seconds" in key:
        return f"{value * 1e3:,.1f}"
    if "exposed" in key:
        return f"{value:.0%}"
    return f"{value:.0e}" if isinstance(value, float) else str(value)


def bars(events: Sequence[tuple[str, float]]) -> list[str]:
    """One line a span, from first to last: `#` computes, `=` is under way, `!` is waited for."""
    at = dict(events)
    zero = min(at.values())
    whole = max(at.values()) - zero
    spans = sorted(_spans(at), key=lambda span: span[1])
    lines = [f"{'ms':24}{'from':>6}{'to':>6}  # computes, = is under way, ! is waited for"]
    for label, start, end, waited in spans:
        # Where a bar is cut: begin, begin of waiting, end.
        cuts = [round((x - zero) / whole * WIDTH) for x in (start, min(waited, end), end)]
        fill = "=" if label in EXCHANGES else "#"
        bar = fill * (cuts[1] - cuts[0]) + "!" * (cuts[2] - cuts[1])
        times = f"{(start - zero) * 1e3:6.1f}{(end - zero) * 1e3:6.1f}"
        lines.append(f"{label:24}{times}  {' ' * cuts[0]}{bar}".rstrip())
    return lines


def _spans(at: Mapping[str, float]) -> list[tuple[str, float, float, float]]:
    """What took time: label, begin, end, and where waiting for it began."""
    found: list[tuple[str, float, float, float]] = []
    for what, start in at.items():
        if what.endswith(" begins"):
            name = what.removesuffix(" begins")
            end = at.get(f"{name} ends", start)
            found.append((name, start, end, end))
    for number, name in enumerate(EXCHANGES, start=1):
        waited, end = at[f"{number} is waited for"], at[f"{number} arrived"]
        found.append((name, at[f"{number} starts"], end, waited))
    for number, name in ((2, "experts"), (4, "experts backward")):
        end = at[f"{number + 1} starts"]
        found.append((name, at[f"{number} goes on"], end, end))
    return found
