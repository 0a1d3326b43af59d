"""`moebius bench`: benchmarks that check the outputs agree before they time anything."""

from pathlib import Path
from typing import Annotated

import typer

from moebius.bench.attention import SHAPES as ATTENTION_SHAPES
from moebius.bench.attention import bench_attention
from moebius.bench.curate import bench_curate
from moebius.bench.loader import bench_loader
from moebius.bench.loss import SHAPES as LOSS_SHAPES
from moebius.bench.loss import bench_loss
from moebius.bench.minhash import bench_minhash
from moebius.bench.moe import LOADS, bench_moe
from moebius.bench.moe import SHAPES as MOE_SHAPES
from moebius.bench.optimizer import bench_optimizer
from moebius.bench.overlap import Setting, bench_overlap
from moebius.bench.precision import bench_precision
from moebius.bench.saving import bench_saving
from moebius.bench.steady import bench_steady
from moebius.bench.step import bench_step
from moebius.bench.table import print_result
from moebius.bench.timeline import lines
from moebius.bench.timing import WARM_UP
from moebius.cli.common import (
    AsJson,
    AsMarkdown,
    Device,
    OpPrecision,
    Overrides,
    Rate,
    RecipeName,
    Repeats,
    Threads,
    run_or_default,
)
from moebius.monitor.progress import progress_bar

app = typer.Typer(help="Benchmarks that check the outputs agree.", no_args_is_help=True)


@app.command("step")
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
            run_or_default(name, overrides),
            peers=peer or (),
            forced_balanced=forced_balanced,
            repeats=repeats,
            warm_up=warm_up,
            apart=apart,
            progress=progress,
        )
    print_result(result, as_json, as_markdown)


@app.command("moe")
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


@app.command("attention")
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


@app.command("loss")
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


@app.command("optimizer")
def optimizer_bench(
    name: RecipeName = "quickstart",
    overrides: Overrides = None,
    repeats: Repeats = 10,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Time each optimizer rule on a recipe's weights, and its share of a step."""
    with progress_bar() as progress:
        run = run_or_default(name, overrides)
        result = bench_optimizer(run, repeats=repeats, progress=progress)
    print_result(result, as_json, as_markdown)


@app.command("loader")
def loader_bench(
    name: RecipeName = "quickstart",
    overrides: Overrides = None,
    repeats: Repeats = 10,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Time the loader against what training steps of a recipe take."""
    with progress_bar() as progress:
        run = run_or_default(name, overrides)
        result = bench_loader(run, repeats=repeats, progress=progress)
    print_result(result, as_json, as_markdown)


@app.command("steady")
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
        run = run_or_default(name, overrides)
        result = bench_steady(run, steps=steps, every=every, progress=progress)
    print_result(result, as_json, as_markdown)


@app.command("precision")
def precision_bench(
    name: RecipeName = "quickstart",
    overrides: Overrides = None,
    repeats: Repeats = 5,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Time a training step in every low-precision format, beside bf16."""
    with progress_bar() as progress:
        run = run_or_default(name, overrides)
        result = bench_precision(run, repeats=repeats, progress=progress)
    print_result(result, as_json, as_markdown)


@app.command("saving")
def saving_bench(
    name: RecipeName = "quickstart",
    overrides: Overrides = None,
    repeats: Repeats = 10,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Time what a checkpoint costs the step that it is made in, and those beside it."""
    with progress_bar() as progress:
        run = run_or_default(name, overrides)
        result = bench_saving(run, repeats=repeats, progress=progress)
    print_result(result, as_json, as_markdown)


@app.command("overlap")
def overlap_bench(
    delay_ms: Annotated[float, typer.Option(help="What each exchange takes longer.")] = 10.0,
    tokens: Annotated[int, typer.Option(help="Tokens of each process.")] = 256,
    width: Annotated[int, typer.Option(help="Model width.")] = 256,
    exchange: Annotated[str, typer.Option(help="all_to_all or all_gather.")] = "all_to_all",
    repeats: Repeats = 10,
    as_json: AsJson = False,
) -> None:
    """Show how much of a MoE's communication ScMoE hides, over a link that is slowed down."""
    setting = Setting(delay_ms / 1e3, tokens, width, exchange, repeats)
    print("\n".join(lines(bench_overlap(setting), as_json)))


@app.command("minhash")
def minhash_bench(
    texts: Annotated[Path, typer.Argument(help="A folder of .txt books.")],
    datatrove_python: Annotated[
        Path | None, typer.Option(help="The Python of an environment with datatrove and spaCy.")
    ] = None,
    originals: Annotated[int, typer.Option(min=1, help="Documents before edits.")] = 4000,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Find planted near duplicates, beside datatrove: recall, false positives, documents/s."""
    result = bench_minhash(texts, datatrove_python=datatrove_python, originals=originals)
    print_result(result, as_json, as_markdown)


@app.command("curate")
def curate_bench(
    pages: Annotated[Path, typer.Argument(help="A folder of .html(.gz) pages.")],
    datatrove_python: Annotated[
        Path | None, typer.Option(help="The Python of an environment with datatrove and spaCy.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes of each.")] = 1,
    times: Annotated[int, typer.Option(min=1, help="Copies of the pages in other words.")] = 3,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Curate pages from WARC to deduplicated documents, beside datatrove: pages a second."""
    result = bench_curate(
        pages, datatrove_python=datatrove_python, workers=workers, repeats_of_corpus=times
    )
    print_result(result, as_json, as_markdown)
