"""The command line: one verb a stage. It parses, calls and prints; the logic lives in the rooms."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moebius.bench.attention import SHAPES as ATTENTION_SHAPES
from moebius.bench.attention import bench_attention
from moebius.bench.loader import bench_loader
from moebius.bench.loss import SHAPES as LOSS_SHAPES
from moebius.bench.loss import bench_loss
from moebius.bench.moe import LOADS, bench_moe
from moebius.bench.moe import SHAPES as MOE_SHAPES
from moebius.bench.optimizer import bench_optimizer
from moebius.bench.steady import bench_steady
from moebius.bench.step import bench_step
from moebius.bench.table import print_result
from moebius.bench.timing import WARM_UP
from moebius.checkpoint.hf import Target
from moebius.checkpoint.hf.exporter import export_hf
from moebius.checkpoint.hf.importer import import_hf
from moebius.config import from_json, override
from moebius.data import inspect, render
from moebius.infer.load import load
from moebius.infer.sample import sample_text
from moebius.lab.grow import grow, parse_factor
from moebius.lab.growth import growth_experiment
from moebius.lab.noise import noise_at_start, noise_of_folder, noise_rows
from moebius.lab.plan import plan
from moebius.lab.plan_table import render_plan
from moebius.lab.race import Race, race_experiment
from moebius.lab.transfer import Sweep, transfer_experiment
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
lab_app = typer.Typer(help="Experiments over several runs.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(lab_app, name="lab")

GROWTH = "moebius.lab.growth:small"
N = TypeVar("N", int, float)

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


def _run_or_default(name: str, overrides: list[str] | None, default: str = "quickstart") -> Run:
    """The run of verbs whose recipe may be left out, so that an override may come first."""
    if "=" in name:
        return _run(default, [name, *(overrides or [])])
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
        stops=model.stops,
    )
    typer.echo(text)


@app.command("import")
def import_folder(
    source: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="config.json, safetensors.")],
    out: Annotated[Path, typer.Argument(help="The run folder to write.")],
) -> None:
    """Turn a Hugging Face folder into a run folder, refusing what would not be exact."""
    typer.echo(import_hf(source, out, say=_say))


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
    typer.echo(export_hf(run, out, target=from_json(Target, target), dtype=dtype, say=_say))


@app.command("grow")
def grow_run(
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
            run, out, layers=factor, experts=experts, top_k=top_k, say=_say, progress=progress
        )
    typer.echo(grown)


@app.command("plan")
def plan_recipe(
    name: Annotated[str, typer.Argument(metavar="[RECIPE]")] = "quickstart",
    overrides: Overrides = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of context (else the sequence length).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count parameters, FLOPs, cache and memory of a recipe, beside the published figures."""
    found = plan(_run_or_default(name, overrides), context)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console().print(render_plan(found))


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
    run = _run_or_default(name, overrides)
    with progress_bar() as progress:
        prepared, loader = open_data(run, progress)
    found = inspect(prepared, loader)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console().print(render(found))


@bench_app.command("step")
def step_bench(
    name: RecipeName = "quickstart",
    overrides: Overrides = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="Other code beside it: transformers.")
    ] = None,
    forced_balanced: Annotated[
        bool, typer.Option(help="Time forced-balanced routing as well.")
    ] = True,
    repeats: Repeats = 10,
    warm_up: Annotated[
        int,
        typer.Option(min=0, help="Steps of our model before it is timed; routing settles in them."),
    ] = WARM_UP,
    apart: Annotated[
        bool, typer.Option("--apart", help="One model after the other, to save memory.")
    ] = False,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Time whole training steps of a recipe, its dense twin and peers, after checking outputs."""
    with progress_bar() as progress:
        result = bench_step(
            _run_or_default(name, overrides),
            peers=peer or (),
            forced_balanced=forced_balanced,
            repeats=repeats,
            warm_up=warm_up,
            apart=apart,
            progress=progress,
        )
    print_result(result, as_json, as_markdown)


@bench_app.command("moe")
def moe_bench(
    shape: Annotated[
        list[str] | None, typer.Option(help="NxDxFxExS: tokens, widths, experts, selected.")
    ] = None,
    load: Annotated[list[str] | None, typer.Option(help="uniform or zipf.")] = None,
    device: Device = "auto",
    precision: OpPrecision = "bf16",
    threads: Threads = None,
    matmul_flops: Rate = None,
    repeats: Repeats = 10,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Time one MoE layer against a dense SwiGLU of the same useful FLOPs."""
    result = bench_moe(
        shape or MOE_SHAPES,
        load or LOADS,
        device=device,
        precision=precision,
        threads=threads,
        matmul_flops=matmul_flops,
        repeats=repeats,
    )
    print_result(result, as_json, as_markdown)


@bench_app.command("attention")
def attention_bench(
    shape: Annotated[
        list[str] | None, typer.Option(help="BxTxHxGxKxV: rows, tokens, heads, their widths.")
    ] = None,
    documents: Annotated[list[int] | None, typer.Option(help="Documents packed in a row.")] = None,
    device: Device = "auto",
    precision: OpPrecision = "bf16",
    threads: Threads = None,
    matmul_flops: Rate = None,
    repeats: Repeats = 10,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Time attention beside its naive form and torch's."""
    result = bench_attention(
        shape or ATTENTION_SHAPES,
        documents or (1, 4),
        device=device,
        precision=precision,
        threads=threads,
        matmul_flops=matmul_flops,
        repeats=repeats,
    )
    print_result(result, as_json, as_markdown)


@bench_app.command("loss")
def loss_bench(
    shape: Annotated[
        list[str] | None, typer.Option(help="NxDxV: tokens, width, vocabulary.")
    ] = None,
    device: Device = "auto",
    precision: OpPrecision = "bf16",
    threads: Threads = None,
    matmul_flops: Rate = None,
    repeats: Repeats = 10,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Time head and cross-entropy: every backend of ours, and torch's forms."""
    result = bench_loss(
        shape or LOSS_SHAPES,
        device=device,
        precision=precision,
        threads=threads,
        matmul_flops=matmul_flops,
        repeats=repeats,
    )
    print_result(result, as_json, as_markdown)


@bench_app.command("optimizer")
def optimizer_bench(
    name: RecipeName = "quickstart",
    overrides: Overrides = None,
    repeats: Repeats = 10,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Time each optimizer rule on a recipe's weights, and its share of a step."""
    with progress_bar() as progress:
        run = _run_or_default(name, overrides)
        result = bench_optimizer(run, repeats=repeats, progress=progress)
    print_result(result, as_json, as_markdown)


@bench_app.command("loader")
def loader_bench(
    name: RecipeName = "quickstart",
    overrides: Overrides = None,
    repeats: Repeats = 10,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Time the loader against what training steps of a recipe take."""
    with progress_bar() as progress:
        run = _run_or_default(name, overrides)
        result = bench_loader(run, repeats=repeats, progress=progress)
    print_result(result, as_json, as_markdown)


@bench_app.command("steady")
def steady_bench(
    name: RecipeName = "quickstart",
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Steps in all.")] = 500,
    every: Annotated[int, typer.Option(help="Steps a row.")] = 50,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Time hundreds of steps of a recipe: nothing may grow, nothing slow down."""
    with progress_bar() as progress:
        run = _run_or_default(name, overrides)
        result = bench_steady(run, steps=steps, every=every, progress=progress)
    print_result(result, as_json, as_markdown)


@lab_app.command("growth")
def growth_lab(
    name: Annotated[str, typer.Argument(metavar="[RECIPE]")] = GROWTH,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="Pairs of runs.")] = 3,
    out: Annotated[Path, typer.Option(help="Where the runs go; what is done is kept.")] = Path(
        "runs/growth"
    ),
    as_json: AsJson = False,
) -> None:
    """Measure whether stacking layers pays: against training from scratch at equal FLOPs."""
    with progress_bar() as progress:
        found = growth_experiment(
            _run_or_default(name, overrides, GROWTH), out, seeds=seeds, say=_say, progress=progress
        )
    if as_json:
        typer.echo(json.dumps(found, indent=2))


@lab_app.command("noise")
def noise_lab(
    name: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or a recipe.")],
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option(help="Batches measured.")] = 8,
    micro: Annotated[int, typer.Option(help="Sequences of a micro-batch.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Measure the gradient noise scale, and the learning rate of experts that follows from it."""
    with progress_bar() as progress:
        if Path(name).is_dir():
            if overrides:
                raise ValueError("a run is measured as it is; leave out the overrides")
            found = noise_of_folder(
                Path(name), repeats=repeats, micro=micro, say=_say, progress=progress
            )
        else:
            run = _run(name, overrides)
            found = noise_at_start(run, repeats=repeats, micro=micro, progress=progress)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(noise_rows(found), as_json=False)
        typer.echo(found["says"])


@lab_app.command("transfer")
def transfer_lab(
    overrides: Overrides = None,
    widths: Annotated[
        str, typer.Option(help="Model widths; transfer starts at the first.")
    ] = "128,256,512",
    rates: Annotated[
        str | None, typer.Option(help="Learning rates to try, such as 0.001,0.002,0.004.")
    ] = None,
    modes: Annotated[str, typer.Option(help="Without the rule, with it, or both.")] = "off,on",
    seeds: Annotated[int, typer.Option(help="Runs of each width and rate.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the runs go; what is done is kept.")] = Path(
        "runs/transfer"
    ),
) -> None:
    """Find the best learning rate of each width, with and without the rule that transfers it."""
    sweep = Sweep(widths=_numbers(widths, int), seeds=seeds, modes=tuple(modes.split(",")))
    if rates is not None:
        sweep = dataclasses.replace(sweep, rates=_numbers(rates, float))
    with progress_bar() as progress:
        transfer_experiment(sweep, out, overrides=overrides or (), say=_say, progress=progress)


@lab_app.command("race")
def race_lab(
    name: Annotated[str, typer.Argument(metavar="[RECIPE]")] = "quickstart",
    overrides: Overrides = None,
    moe_lr: Annotated[float | None, typer.Option(help="The MoE's own learning rate.")] = None,
    dense_lr: Annotated[float | None, typer.Option(help="Its dense twin's.")] = None,
    moe_steps: Annotated[int | None, typer.Option(help="The MoE's steps, if fewer.")] = None,
    seeds: Annotated[int, typer.Option(help="Races.")] = 3,
    looks: Annotated[int, typer.Option(help="Evaluations of a model on its way.")] = 20,
    out: Annotated[Path, typer.Option(help="Where the runs go; what is done is kept.")] = Path(
        "runs/race"
    ),
) -> None:
    """Race a MoE against its dense twin: which reaches the twin's loss in less time?"""
    race = Race(moe_lr, dense_lr, moe_steps, seeds, looks)
    with progress_bar() as progress:
        race_experiment(race, _run_or_default(name, overrides), out, say=_say, progress=progress)


def _numbers(text: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers such as 128,256,512") from None


def _say(text: str) -> None:
    print(text, file=sys.stderr)


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
