"""`moebius lab`: experiments over several runs."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from moebius.cli.common import AsJson, Overrides, print_rows, run_of, run_or_default, say
from moebius.lab.growth import growth_experiment
from moebius.lab.noise import noise_at_start, noise_of_folder, noise_rows
from moebius.lab.race import Race, race_experiment
from moebius.lab.transfer import Sweep, transfer_experiment
from moebius.monitor.progress import progress_bar

app = typer.Typer(help="Experiments over several runs.", no_args_is_help=True)

GROWTH = "moebius.lab.growth:small"
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


def _numbers(text: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers such as 128,256,512") from None
