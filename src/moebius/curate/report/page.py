"""The report of a curation: `report.html`, one self-contained page about an output folder.

Counts are exact and come from `counts.json`; texts and histograms are of a sample, read in bounded
memory. Whatever came with a document is a stranger's text and is escaped wherever it appears.
"""

from collections.abc import Sequence
from pathlib import Path

from moebius.curate.report.counted import Counted, StepCounts, read_counted
from moebius.curate.report.flow import flow
from moebius.curate.report.histograms import histograms, populations
from moebius.curate.report.look import STYLE
from moebius.curate.report.parts import (
    examples,
    kept_tables,
    step_part,
    steps_table,
    unread_table,
)
from moebius.curate.report.sample import Budget, Example, Sample, Sampler
from moebius.curate.report.words import safe, share, size
from moebius.monitor.page import Section, render
from moebius.monitor.text import count, duration, printable, whole

KEPT = Budget(rows=10_000, bytes=96 << 20, examples=64)
DROPPED = Budget(rows=1500, bytes=24 << 20, examples=3)
_MAX_KEPT_EXAMPLES = 10


def write_report(folder: Path) -> Path:
    """Write `report.html` into a curation's folder and return its path.

    Raises ValueError where the folder holds no finished curation, or pyarrow is not there.
    """
    counted = read_counted(folder)
    sampler = Sampler()
    kept = sampler.take(folder / "documents", KEPT)
    places = _dropped_places(folder)
    dropped = [_dropped(sampler, step, places) for step in counted.steps]
    title = printable(counted.name)
    page = render(f"{title}: curation", _head(counted), _sections(counted, kept, dropped))
    path = folder / "report.html"
    aside = folder / "report.html.part"
    aside.write_text(page, encoding="utf-8")
    aside.replace(path)
    return path


def _dropped_places(folder: Path) -> dict[int, Path]:
    """The folders `dropped/NN-STEP` by the step's number, from 1 on."""
    found: dict[int, Path] = {}
    for path in sorted((folder / "dropped").glob("*")):
        number = path.name.partition("-")[0]
        if path.is_dir() and number.isdigit() and len(number) < 6:
            found[int(number)] = path
    return found


def _dropped(sampler: Sampler, step: StepCounts, places: dict[int, Path]) -> Sample:
    place = places.get(step.index + 1)
    return Sample() if place is None else sampler.take(place, DROPPED, list(step.dropped))


def _sections(counted: Counted, kept: Sample, dropped: Sequence[Sample]) -> list[Section]:
    pairs = zip(counted.steps, dropped, strict=True)
    plots = histograms(*populations(counted, kept, dropped))
    shown = examples(_chosen(kept.examples.get("", [])))
    return [
        Section(
            "Flow",
            "From the sources through the steps, top to bottom; what is dropped turns off to the "
            "right, a band a reason, all in proportion.",
            (flow(counted),),
        ),
        Section(
            "Steps",
            "Exact counts of what each step saw; documents that it leaves alone, for their kind or "
            "source, pass by uncounted. Documents per second are of one worker.",
            (steps_table(counted),) if counted.steps else (),
        ),
        Section(
            "What each step did",
            "Open a step for its reasons, and for documents that it dropped or changed.",
            tuple(step_part(step, sample, kept.examples) for step, sample in pairs),
        ),
        Section(
            "Before and after",
            "Before: all documents as they were when they left. Estimated from a sample.",
            tuple(plots),
        ),
        Section(
            "What is kept",
            "",
            tuple(part for part in (kept_tables(counted), shown) if part),
        ),
        Section("What was not read", "", (unread_table(counted),)),
        Section("About this page", "", (_about(kept, dropped),)),
    ]


def _chosen(found: list[Example]) -> list[Example]:
    """Kept documents that differ: one of each source and language first."""
    first: dict[tuple[str, str], Example] = {}
    for example in found:
        first.setdefault((example.source, example.language), example)
    rest = [example for example in found if example not in first.values()]
    return [*first.values(), *rest][:_MAX_KEPT_EXAMPLES]


def _head(counted: Counted) -> str:
    read, kept = counted.read, counted.kept
    unread = sum(a.documents for reasons in counted.unread.values() for a in reasons.values())
    speed = read.documents / counted.seconds if counted.seconds else None
    figures = [
        ("documents read", whole(read.documents), f"{len(counted.sources)} sources"),
        ("kept", whole(kept.documents), share(kept.documents, read.documents)),
        ("bytes read", size(read.bytes), "raw pages as they came"),
        ("bytes kept", size(kept.bytes), share(kept.bytes, read.bytes)),
        ("steps", whole(len(counted.steps)), ""),
        ("not read", whole(unread), "inputs, by reason below"),
    ]
    if counted.seconds is not None:
        figures.append(("time", duration(counted.seconds), f"{count(speed)} documents/s"))
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>"
        for name, value, more in figures
    )
    engine = f" &middot; engine {safe(counted.engine, 40)}" if counted.engine else ""
    return (
        f'{STYLE}<h1>{safe(counted.name)}</h1><p class="sub">curation{engine}</p>'
        f'<dl class="figures">{cells}</dl>'
    )


def _about(kept: Sample, dropped: Sequence[Sample]) -> str:
    samples = [kept, *dropped]
    rows, files = sum(len(s.rows) for s in samples), sum(s.files for s in samples)
    torn = sum(sample.unreadable for sample in samples)
    lost = f" {torn} file(s) or parts of files could not be read." if torn else ""
    return (
        f'<p class="foot">Counts are exact. Histograms and examples are of {whole(len(kept.rows))} '
        f"kept and {whole(rows - len(kept.rows))} dropped documents, read from parts of "
        f"{whole(files)} files in an order by hash; texts are cut.{lost}</p>"
    )
