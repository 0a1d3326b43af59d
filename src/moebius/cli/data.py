"""`moebius data`: what the trainer reads."""

import json

import typer
from rich.console import Console

from moebius.cli.common import AsJson, Overrides, RecipeName, run_or_default
from moebius.data.inspect import inspect, render
from moebius.monitor.progress import progress_bar
from moebius.train.session import open_data

app = typer.Typer(help="Corpora: documents, tokens, mixtures.", no_args_is_help=True)


@app.command("inspect")
def inspect_data(
    name: RecipeName = "quickstart",
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show a recipe's corpus: sizes, mixture, what was skipped and why, decoded samples."""
    run = run_or_default(name, overrides)
    with progress_bar() as progress:
        prepared, loader = open_data(run, progress)
    found = inspect(prepared, loader)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console().print(render(found))
