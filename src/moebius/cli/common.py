"""What the verbs share: options, recipes with their overrides, tables."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moebius.config import override
from moebius.recipes import recipe
from moebius.train.run import Run

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides such as optim.lr=6e-4 or data.path=DIR.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the table as JSON.")]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Print the table as markdown.")]
RecipeName = Annotated[str, typer.Argument(metavar="[RECIPE]")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
OpPrecision = Annotated[str, typer.Option(help="bf16, fp32 or fp64.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the CPU (else torch's choice).")]
Rate = Annotated[float | None, typer.Option(help="FLOP/s of plain products (else measured).")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed turns of each; medians are shown.")]


def run_of(name: str, overrides: list[str] | None) -> Run:
    return override(recipe(name), overrides or [])


def run_or_default(name: str, overrides: list[str] | None, default: str = "quickstart") -> Run:
    """The run of verbs whose recipe may be left out, so that an override may come first."""
    if "=" in name:
        return run_of(default, [name, *(overrides or [])])
    return run_of(name, overrides)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(box=None)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    # A file or a pipe has no width that anything would have to be cut to.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def _cell(value: Any) -> Text:
    shown = f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
    return Text(shown)
