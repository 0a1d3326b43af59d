"""`moebius lab`: experiments over several runs."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from moebius.cli.common import AsJson, Overrides, Threads, print_rows, run_of, run_or_default, say
from moebius.config import override
from moebius.lab.curation import Ablation, curation_experiment, table
from moebius.lab.dirt import Dirt, soil
from moebius.lab.growth import growth_experiment
from moebius.lab.noise import noise_at_start, noise_of_folder, noise_rows
from moebius.lab.race import Race, race_experiment
from moebius.lab.transfer import Sweep, transfer_experiment
from moebius.monitor.progress import progress_bar
from moebius.recipes import curation

app = typer.Typer(help="Experiments over several runs.", no_args_is_help=True)

GROWTH = "moebius.lab.growth:small"
JUDGE = "moebius.lab.curation:small"
N = TypeVar("N", int, float)


@app.command("growth")
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
            run_or_default(name, overrides, GROWTH), out, seeds=seeds, say=say, progress=progress
        )
    if as_json:
        typer.echo(json.dumps(found, indent=2))


@app.command("noise")
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
                Path(name), repeats=repeats, micro=micro, say=say, progress=progress
            )
        else:
            run = run_of(name, overrides)
            found = noise_at_start(run, repeats=repeats, micro=micro, progress=progress)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_rows(noise_rows(found), as_json=False)
        typer.echo(found["says"])


@app.command("transfer")
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
        transfer_experiment(sweep, out, overrides=overrides or (), say=say, progress=progress)


@app.command("race")
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
        race_experiment(race, run_or_default(name, overrides), out, say=say, progress=progress)


@app.command("curation")
def curation_lab(
    name: Annotated[str, typer.Argument(metavar="CURATION")],
    overrides: Overrides = None,
    validation: Annotated[
        list[str] | None, typer.Option(help="A clean text the models are read on: NAME=PATH.")
    ] = None,
    train: Annotated[str, typer.Option(help="The recipe of the model.")] = JUDGE,
    steps: Annotated[int | None, typer.Option(help="Its training steps.")] = None,
    threads: Threads = None,
    seeds: Annotated[int, typer.Option(help="Models of each corpus.")] = 3,
    out: Annotated[Path, typer.Option(help="Where all goes; what is done is kept.")] = Path(
        "runs/curation"
    ),
    as_json: AsJson = False,
) -> None:
    """Measure what each step of a curation is worth, in bits per byte of clean texts."""
    places: dict[str, Path] = {}
    for text in validation or []:
        title, equals, path = text.partition("=")
        if not equals or not title or not path:
            raise ValueError(f"--validation {text!r}: write NAME=PATH")
        places[title] = Path(path)
    run = run_of(train, [f"threads={threads}"] if threads else [])
    run = dataclasses.replace(run, steps=steps or run.steps)
    with progress_bar() as progress:
        found = curation_experiment(
            override(curation(name), overrides or []),
            Ablation(run, places, seeds),
            out,
            say=say,
            progress=progress,
        )
    typer.echo(json.dumps(found, indent=2) if as_json else table(found))


@app.command("dirt")
def dirt_lab(
    clean: Annotated[Path, typer.Argument(help="Clean texts: a file or folder.")],
    out: Annotated[Path, typer.Argument(help="The JSON lines to write.")],
    foreign: Annotated[
        Path | None, typer.Option(help="Texts of another language to mix in.")
    ] = None,
    words: Annotated[int, typer.Option(help="Words of a page.")] = 300,
    boilerplate: Annotated[float, typer.Option(help="Share of pages with it.")] = 0.5,
    copies: Annotated[float, typer.Option(help="Exact copies, as a share of the pages.")] = 0.4,
    near_copies: Annotated[float, typer.Option(help="Copies with 2% of words changed.")] = 0.3,
    gibberish: Annotated[float, typer.Option(help="Pages without meaning.")] = 0.3,
    foreign_share: Annotated[float, typer.Option(help="Pages of the other language.")] = 0.3,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Make a clean corpus dirty at known shares, for `moebius lab curation dirtied`."""
    share = 0.0 if foreign is None else foreign_share
    dirt = Dirt(words, boilerplate, copies, near_copies, gibberish, share, seed=seed)
    for kind, count in soil(clean, foreign, out, dirt).items():
        typer.echo(f"{kind}: {count:,} pages")


def _numbers(text: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers such as 128,256,512") from None
