"""The command line: one verb a stage. It parses, calls and prints; the logic lives in the rooms."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moebius.checkpoint.hf import Target
from moebius.checkpoint.hf.exporter import export_hf
from moebius.checkpoint.hf.importer import import_hf
from moebius.cli import bench, data, lab
from moebius.cli.common import AsJson, Overrides, print_rows, run_of, run_or_default, say
from moebius.cli.curate import curate_recipe
from moebius.config import from_json
from moebius.infer.load import load
from moebius.infer.sample import sample_text
from moebius.lab.grow import grow, parse_factor
from moebius.lab.plan import plan
from moebius.lab.plan_table import render_plan
from moebius.lab.planner.hardware import PRICE
from moebius.lab.planner.search import plan_inference, plan_training
from moebius.lab.planner.table import render_inference, render_training
from moebius.monitor.compare import compare_rows, write_comparison
from moebius.monitor.progress import progress_bar
from moebius.monitor.report import write_report
from moebius.monitor.runs import list_runs
from moebius.recipes import listing
from moebius.train.fit import begin_or_go_on, continue_run, fit

app = typer.Typer(
    help="Train small Mixture-of-Experts language models, from raw text to a served model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(lab.app, name="lab")
app.command("curate")(curate_recipe)


@app.command()
def train(
    recipe_name: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A recipe, or file.py:function.")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder (else runs/NAME-N).")] = None,
    go_on: Annotated[
        bool, typer.Option("--go-on", help="Where --out holds this run already, go on with it.")
    ] = False,
) -> None:
    """Train a recipe in a new run folder, or go on with a stopped run."""
    if go_on and (resume is not None or out is None or recipe_name is None):
        raise ValueError("--go-on needs a recipe and --out, the folder to begin or go on in")
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
        if go_on and out is not None:
            begin_or_go_on(run_of(recipe_name, overrides), out, progress)
        else:
            fit(run_of(recipe_name, overrides), out, progress)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes."""
    print_rows(listing(), as_json)


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
        stops=model.stops,
    )
    typer.echo(text)


@app.command("import")
def import_folder(
    source: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="config.json, safetensors.")],
    out: Annotated[Path, typer.Argument(help="The run folder to write.")],
) -> None:
    """Turn a Hugging Face folder into a run folder, refusing what would not be exact."""
    typer.echo(import_hf(source, out, say=say))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[Path, typer.Argument(help="The Hugging Face folder to write.")],
    target: Annotated[
        str, typer.Option("--for", help="Who loads it: transformers, vllm or sglang.")
    ] = "transformers",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16 (else as it is stored).")
    ] = None,
) -> None:
    """Write a run as a Hugging Face folder that loads without any code of ours."""
    typer.echo(export_hf(run, out, target=from_json(Target, target), dtype=dtype, say=say))


@app.command("grow")
def growrun_of(
    run: Annotated[Path, typer.Argument(help="The folder of the run to grow; it stays as it is.")],
    layers: Annotated[
        str | None, typer.Option(help="Repeat the stack of layers: 2x, 3x, ...")
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="Make each dense feed-forward that many experts.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Experts a token gets, with --experts.")] = 2,
    out: Annotated[Path | None, typer.Option(help="The new folder (else runs/NAME-...).")] = None,
) -> None:
    """Grow a run into a new one that `train --resume` goes on with."""
    factor = None if layers is None else parse_factor(layers)
    with progress_bar() as progress:
        grown = grow(
            run, out, layers=factor, experts=experts, top_k=top_k, say=say, progress=progress
        )
    typer.echo(grown)


@app.command("plan")
def plan_recipe(
    name: Annotated[str, typer.Argument(metavar="[RECIPE]")] = "quickstart",
    overrides: Overrides = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of context (else the sequence length).")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Simulate training there, over all layouts: 2x8xH200.")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens a step, with --cluster (else the recipe's last).")
    ] = None,
    price: Annotated[float, typer.Option(help="Dollars a device and hour.")] = PRICE,
    inference: Annotated[
        bool, typer.Option("--inference", help="Simulate decoding instead, with --cluster.")
    ] = False,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences at once, with --inference (else: most).")
    ] = None,
    acceptance: Annotated[
        float, typer.Option(help="Chance that one drafted token is accepted; 0: no drafts.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Count parameters, FLOPs, cache and memory of a recipe, or simulate it on a cluster."""
    run = run_or_default(name, overrides)
    if cluster is None:
        if inference or batch_tokens is not None or batch is not None:
            raise ValueError("say which machines with --cluster, such as --cluster 2x8xH200")
        found = plan(run, context)
        shown = render_plan
    elif inference:
        found = plan_inference(
            run, cluster, context=context, batch=batch, acceptance=acceptance, price=price
        )
        shown = render_inference
    else:
        found = plan_training(run, cluster, context=context, batch_tokens=batch_tokens, price=price)
        shown = render_training
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console().print(shown(found))


@app.command()
def runs(
    root: Annotated[Path, typer.Argument(help="Where run folders lie.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs of a folder."""
    print_rows(list_runs(root), as_json)


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
    print_rows(rows, as_json)
    if not as_json:
        typer.echo(page)


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
