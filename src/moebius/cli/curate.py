"""`moebius curate`: raw pages, books and code -> clean documents, every step counted."""

import shlex
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from moebius.cli.common import Overrides, say
from moebius.config import override
from moebius.curate.mixed import check, train_fields
from moebius.curate.pipeline import curate, mix_of
from moebius.curate.report import write_report
from moebius.monitor.progress import progress_bar
from moebius.monitor.runs import read_json
from moebius.recipes import curation, recipe


def curate_recipe(
    name: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe, file.py:function, or report or mix.")
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder (else curated/NAME); goes on where it stopped.")
    ] = None,
    train: Annotated[str, typer.Option(help="With mix: the recipe to train.")] = "quickstart",
    tokens: Annotated[
        int | None, typer.Option(help="With mix: tokens to train on (else the recipe's).")
    ] = None,
) -> None:
    """Clean raw sources into documents that `train data.path=OUT/documents` reads.

    `moebius curate report FOLDER` writes the report page of a finished curation again;
    `moebius curate mix FOLDER` says how its mix is trained on, and how often each group is read.
    """
    if name in ("report", "mix"):
        if not overrides or len(overrides) > 1:
            raise ValueError(f"say which: moebius curate {name} FOLDER")
        folder = Path(overrides[0])
        typer.echo(write_report(folder) if name == "report" else _mix(folder, train, tokens))
        return
    recipe_ = override(curation(name), overrides or [])
    with progress_bar() as progress:
        folder = curate(recipe_, out or Path("curated", recipe_.name), progress)
    Console().print(_table(folder))
    say(f"documents in {folder / 'documents'}, the report in {folder / 'report.html'}")


def _mix(folder: Path, name: str, tokens: int | None) -> str:
    """The command that trains on a curation's mix; on stderr how often each group is read."""
    run, mix = recipe(name), mix_of(folder)
    total = tokens or run.steps * run.tokens_per_step()
    kept = read_json(folder / "counts.json")["kept"]["by_group"]
    needs = check(mix, {group: size for group, (_, size) in kept.items()}, total)
    for need in needs:
        say(f"stage {need.stage}: {need.share:.0%} of {need.group}, {need.epochs:.2f} epochs")
        if need.binds:
            say(need.describe())
    fields = train_fields(
        mix, folder, tokens=total, batch=run.batch, sequence_length=run.sequence_length
    )
    return shlex.join(["moebius", "train", name, *fields])


def _table(folder: Path) -> Table:
    """What came in, what each step dropped, what is kept."""
    counts, timing = read_json(folder / "counts.json"), read_json(folder / "timing.json")
    table = Table("step", "in", "out", "changed", "docs/s", "dropped", box=None)
    for step, timed in zip(counts["steps"], timing["steps"], strict=True):
        reasons = ", ".join(f"{reason} {n}" for reason, (n, _) in step["dropped"].items())
        speed = f"{timed['documents'] / timed['seconds']:,.0f}" if timed["seconds"] else "-"
        row = (step["in"][0], step["out"][0], step["changed"])
        table.add_row(step["name"], *(f"{n:,}" for n in row), speed, reasons)
    read = sum(source["documents"] for source in counts["sources"].values())
    unread: Counter[str] = Counter()
    for reasons in counts["unread"].values():
        unread.update({reason: n for reason, (n, _) in reasons.items()})
    said = ", ".join(f"{reason} {n}" for reason, n in sorted(unread.items()))
    table.title = f"{read:,} documents read" + (f"; not read: {said}" if said else "")
    kept = counts["kept"]
    table.caption = f"{kept['documents']:,} documents kept, {kept['bytes']:,} bytes of text"
    return table
