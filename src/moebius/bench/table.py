"""The printed forms of a benchmark's result: a table, markdown for docs/benchmarks.md, JSON.

A result is a dict of the machine's facts, `rows`, and perhaps a `split`; the columns shown are
those that some row fills, in the order of `COLUMNS`.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moebius.bench.timing import header


def _count(x: float) -> str:
    return f"{x / 1e6:,.2f}M"


def _bytes(x: float) -> str:
    return f"{x / 2**20:,.0f} MiB"


def _milliseconds(x: float) -> str:
    return f"{x * 1e3:,.2f}"


Form = Callable[[Any], str]
# Key of a row, heading, form of a value.
COLUMNS: Sequence[tuple[str, str, Form]] = (
    ("name", "", str),
    ("case", "case", str),
    ("tokens_per_second", "tokens/s", "{:,.0f}".format),
    ("mfu", "MFU", "{:.1%}".format),
    ("mfu_of_sheet", "of sheet", "{:.1%}".format),
    ("seconds", "ms", _milliseconds),
    ("gflops", "GFLOP/s", "{:,.0f}".format),
    ("step_over_twin", "over twin", "{:.2f}".format),
    ("over_dense", "over dense", "{:.2f}".format),
    ("over_plain", "over plain step", "{:.2f}".format),
    ("over_bf16", "over bf16", "{:.2f}".format),
    ("over_naive", "faster than naive", "{:.2f}".format),
    ("documents_per_second", "documents/s", "{:,.0f}".format),
    ("pages", "pages", "{:,}".format),
    ("pages_per_second", "pages/s", "{:,.1f}".format),
    ("pages_per_cpu_second", "pages per CPU second", "{:,.1f}".format),
    ("planted", "planted", "{:,}".format),
    ("similarity", "similarity", "{:.3f}".format),
    ("expected", "recall by theory", "{:.3f}".format),
    ("recall", "recall", "{:.3f}".format),
    ("recall_of_peer", "recall of peer", "{:.3f}".format),
    ("false_positives", "false positives", "{:,}".format),
    ("kept", "kept", "{:,}".format),
    ("kept_by_both", "kept by both", "{:.1%}".format),
    ("over_peer", "faster than peer", "{:.2f}".format),
    ("cpu_over_peer", "by CPU time", "{:.2f}".format),
    ("over_balanced", "of balanced", "{:.2f}".format),
    ("peak_memory_bytes", "peak", _bytes),
    ("memory_over_peer", "peak over peer", "{:.2f}".format),
    ("resident_bytes", "held", _bytes),
    ("optimizer_share", "optimizer", "{:.1%}".format),
    ("share", "of step", "{:.1%}".format),
    ("own_share", "its own", "{:.1%}".format),
    ("data_share", "data", "{:.2%}".format),
    ("ffn_per_token", "FFN/token", "{:.2f}".format),
    ("max_load", "max load", "{:.2f}".format),
    ("params_active_mean", "active", _count),
    ("params_total", "total", _count),
    ("loss", "loss", "{:.3f}".format),
    ("error", "error", "{:.0e}".format),
    ("agrees", "agrees", lambda x: "yes" if x else "NO"),
)


def cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The headings and the texts of all rows; what a row lacks is a dash."""
    shown = [c for c in COLUMNS if any(row.get(c[0]) is not None for row in rows)]
    texts = [
        ["-" if row.get(key) is None else form(row[key]) for key, _, form in shown] for row in rows
    ]
    return [heading for _, heading, _ in shown], texts


def below(result: Mapping[str, Any]) -> list[str]:
    """The lines under a table: the split of a step, errors, and the notes of rows."""
    lines: list[str] = []
    if result.get("split"):
        named = sorted(result["split"].items(), key=lambda item: -item[1])
        parts = ", ".join(f"{group} {share:.1%}" for group, share in named if share >= 0.0005)
        lines.append(f"time of {result['rows'][0]['name']}: {parts}")
    if result.get("in_use"):
        used = ", ".join(f"{op} {name}" for op, name in result["in_use"].items())
        lines.append(f"in use: {used}")
    for what, errors in [("naive", result.get("errors")), *result.get("peer_errors", {}).items()]:
        if errors:
            found = ", ".join(f"{name} {size:.1e}" for name, size in errors.items())
            lines.append(f"relative error to {what}: {found}")
    for row in result["rows"]:
        if row.get("notes"):
            lines.append(f"{row['name']}: {'; '.join(row['notes'])}")
    return list(dict.fromkeys([*lines, *result.get("notes", [])]))


def rows_table(result: Mapping[str, Any]) -> Table:
    """A result as a table."""
    headings, texts = cells(result["rows"])
    table = Table(box=None)
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for row in texts:
        table.add_row(*(Text(cell) for cell in row))
    return table


def markdown(result: Mapping[str, Any]) -> str:
    """A result as docs/benchmarks.md has it."""
    headings, texts = cells(result["rows"])
    lines = [f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *texts)]
    return "\n\n".join([header(result), "\n".join(lines), *below(result)]) + "\n"


def print_result(result: Mapping[str, Any], as_json: bool, as_markdown: bool) -> None:
    """Print a result in the form asked for."""
    if as_json or as_markdown:
        print(json.dumps(result, indent=2) if as_json else markdown(result))
        return
    # A file or a pipe has no width that anything would have to be cut to.
    console = Console(width=None if sys.stdout.isatty() else 1000)
    console.print(Text(header(result)))
    console.print(rows_table(result))
    for line in below(result):
        console.print(Text(line))
