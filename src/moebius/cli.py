"""The command line: one verb a stage. It parses, calls and prints; the logic lives in the rooms."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moebius.bench.step import bench_step
from moebius.bench.table import rows_table
from moebius.config import override
from moebius.data import inspect, render
from moebius.infer.load import load
from moebius.infer.sample import sample_text
from moebius.monitor.compare import compare_rows, write_comparison
from moebius.monitor.progress import progress_bar
from moebius.monitor.report import write_report
from moebius.monitor.runs import list_runs
from moebius.recipes import listing, recipe
from moebius.train.loop import continue_run, fit
from moebius.train.run import Run
from moebius.train.session import open_data

app = typer.Typer(
    help="Train small Mixture-of-Experts language models, from raw text to a served model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Corpora: documents, tokens, mixtures.", no_args_is_help=True)
bench_app = typer.Typer(help="Benchmarks that check the outputs agree.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides such as optim.lr=6e-4 or data.path=DIR.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the table as JSON.")]


@app.command()
def train(
    recipe_name: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A recipe, or file.py:function.")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder (else runs/NAME-N).")] = None,
) -> None:
    """Train a recipe in a new run folder, or go on with a stopped run."""
    if resume is not None:
        if out is not None:
            raise ValueError("--resume goes on in its own folder; leave out --out")
        given = [text for text in [recipe_name, *(overrides or [])] if text]
        with progress_bar() as progress:
            continue_run(resume, given, progress)
        return
    if recipe_name is None:
        raise ValueError("say which recipe to train, or --resume RUN; `moebius recipes` lists them")
    with progress_bar() as progress:
        fit(_run(recipe_name, overrides), out, progress)


def _run(name: str, overrides: list[str] | None) -> Run:
    return override(recipe(name), overrides or [])


def _run_or_quickstart(name: str, overrides: list[str] | None) -> Run:
    """The run of verbs whose recipe may be left out, so that an override may come first."""
    if "=" in name:
        return _run("quickstart", [name, *(overrides or [])])
    return _run(name, overrides)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes."""
    _print(listing(), as_json)


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    num_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Mass of the likeliest tokens to draw from.")] = 0.95,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Continue a text with a trained model."""
    model, tokenizer = load(run)
    text = sample_text(
        model.lm,
        tokenizer,
        prompt,
        num_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    typer.echo(text)


@app.command()
def runs(
    root: Annotated[Path, typer.Argument(help="Where run folders lie.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs of a folder."""
    _print(list_runs(root), as_json)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write report.html of a run, also while it trains."""
    typer.echo(write_report(run))


@app.command()
def compare(
    run_folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
    as_json: AsJson = False,
) -> None:
    """Overlay runs in one page, and print their figures."""
    rows = compare_rows(run_folders)
    page = write_comparison(run_folders, out)
    _print(rows, as_json)
    if not as_json:
        typer.echo(page)


@data_app.command("inspect")
def inspect_data(
    name: Annotated[str, typer.Argument(metavar="[RECIPE]")] = "quickstart",
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show a recipe's corpus: sizes, mixture, what was skipped and why, decoded samples."""
    run = _run_or_quickstart(name, overrides)
    with progress_bar() as progress:
        prepared, loader = open_data(run, progress)
    found = inspect(prepared, loader)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console().print(render(found))


@bench_app.command("step")
def step_bench(
    name: Annotated[str, typer.Argument(metavar="[RECIPE]")] = "quickstart",
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option(help="Timed steps of each model.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Time whole training steps of a recipe beside a dense model of equal active parameters."""
    with progress_bar() as progress:
        result = bench_step(_run_or_quickstart(name, overrides), repeats, progress)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        Console().print(rows_table(result))


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
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


def main() -> None:
    """Run the command line; what a user can mend is one line on stderr and exit code 2.

    Ctrl-C is exit code 130; typer sees to that.
    """
    try:
        app()
    except ValueError as error:
        print(f"moebius: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        place = "" if error.filename is None else f" ({error.filename})"
        print(f"moebius: {error.strerror or error}{place}", file=sys.stderr)
        sys.exit(2)
