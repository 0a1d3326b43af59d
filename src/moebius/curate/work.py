"""The pieces of work of a curation: a shard of a pass, of a round, a range of records, a union.

Each is a function of one picklable item and leaves one folder or file, written aside and renamed;
where that is there already nothing is done. So any engine may run them, in any order, twice.
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.recfunctions import repack_fields

from moebius.curate.counts import Counts
from moebius.curate.document import Document, Dropped, Unread
from moebius.curate.mix import group_of
from moebius.curate.plan import Pass, Place, passes_of, step_name
from moebius.curate.records import RunWriter, records_of, runs_under
from moebius.curate.shards import Writer, read_documents, valid_text, without_raw
from moebius.curate.step import CorpusStep, Decide, Decision, Step

DONE = "done.json"
FAILED = "step failed on the document"
NOT_UNICODE = "text that is not valid Unicode"


@dataclasses.dataclass(frozen=True)
class ShardWork:
    """Shard `shard` of pass `number`; of round `round` of the corpus step after it, if not 0."""

    place: Place
    number: int
    shard: int
    round: int = 0


@dataclasses.dataclass(frozen=True)
class RangeWork:
    """Buckets `start` to `end` of a round of a corpus step, number `number` of the ranges."""

    place: Place
    stage: Pass
    round: int
    number: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class UnionWork:
    """All `ranges` of round `round` of corpus step `step`."""

    place: Place
    step: int
    round: int
    ranges: int


def _aside(final: Path) -> Path:
    """A fresh folder of this process beside the final one."""
    aside = final.with_name(f"{final.name}.part-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def _publish(aside: Path, final: Path) -> None:
    """Rename a finished folder into place; where another worker was first, its equal one stays."""
    try:
        aside.rename(final)
    except OSError:
        if not (final / DONE).exists():
            raise
        shutil.rmtree(aside)


def _place_of(shard: int, row: int) -> int:
    return shard << 32 | row


# --- a shard of a pass ----------------------------------------------------------------------------


def do_shard(item: ShardWork) -> ShardWork:
    """Read a shard, decide on its documents, write those kept and those dropped, and records."""
    place, stage = item.place, passes_of(item.place.curation)[item.number]
    final = place.shard(item.number, item.shard)
    if (final / DONE).exists():
        return item
    aside = _aside(final)
    counts = Counts()
    last = stage.then is None
    output = _Output(aside, place, item.shard, stage, counts)
    deciders = _deciders(place, stage)
    for row, document in enumerate(_input(item, counts)):
        kept = _decide(deciders, _place_of(item.shard, row), document, counts, output)
        if kept is not None:
            output.keep(without_raw(kept) if last else kept)
    output.close()
    (aside / DONE).write_text(json.dumps(counts.data, sort_keys=True))
    _publish(aside, final)
    return item


def _input(item: ShardWork, counts: Counts) -> Iterator[Document]:
    """The documents of a shard: as the pass before left them, or as the reader gives them."""
    if item.number > 0:
        yield from read_documents(item.place.shard(item.number - 1, item.shard) / "kept.parquet")
        return
    source, task = item.place.tasks()[item.shard]
    reader = item.place.curation.sources[source]
    for found in reader.read(task):
        if isinstance(found, Document):
            found = dataclasses.replace(found, source=reader.name)
            if not valid_text(found):
                found = Unread(ascii(found.key), NOT_UNICODE, found.num_bytes)
        counts.read(reader.name, found)
        if isinstance(found, Document):
            yield found


class _Output:
    """The files of a shard: kept documents (by group in the last pass), dropped ones, records."""

    def __init__(self, folder: Path, place: Place, shard: int, stage: Pass, counts: Counts) -> None:
        self._folder, self._place, self._shard = folder, place, shard
        self._counts, self._then, self._rows = counts, stage.then, 0
        self._kept: dict[str, Writer] = {}
        self._dropped: dict[int, Writer] = {}
        self._runs: RunWriter | None = None
        if stage.then is not None:
            first = place.whole(stage.then).rounds[0]
            self._runs = RunWriter(folder / "records", first)

    def keep(self, document: Document) -> None:
        """Write a document that passed, and collect what the next corpus step wants of it."""
        group = ""
        if self._then is None:
            mix = self._place.curation.mix
            group = "" if mix is None else group_of(mix, document)
            self._counts.kept(document, group)
        elif self._runs is not None and self._place.curation.steps[self._then].takes(document):
            start = time.perf_counter()
            first = self._place.whole(self._then).rounds[0]
            place = _place_of(self._shard, self._rows)
            self._runs.add(first.records(document, place, None))
            self._counts.spend(self._then, time.perf_counter() - start)
        if group not in self._kept:
            name = "kept.parquet" if not group else f"kept/{group}.parquet"
            self._kept[group] = Writer(self._folder / name)
        self._kept[group].add(document)
        self._rows += 1

    def drop(self, step: int, document: Document, why: Dropped) -> None:
        """Write a dropped document into the side file of its step."""
        if step not in self._dropped:
            name = step_name(self._place.curation, step)
            self._dropped[step] = Writer(self._folder / "dropped" / f"{name}.parquet", why=True)
        self._dropped[step].add(document, why)

    def close(self) -> None:
        """Finish all files."""
        for writer in (*self._kept.values(), *self._dropped.values()):
            writer.close()
        if self._runs is not None:
            self._runs.close()


Deciders = list[tuple[int, Step, Callable[[Document, int], Decision]]]


def _deciders(place: Place, stage: Pass) -> Deciders:
    """The steps of a pass, ready to decide on a document at a place."""
    found: Deciders = []
    for number in range(stage.first, stage.last):
        step = place.curation.steps[number]
        if isinstance(step, CorpusStep):
            found.append((number, step, _with_verdicts(place, number)))
        else:
            found.append((number, step, _alone(place.filter(number))))
    return found


def _with_verdicts(place: Place, number: int) -> Callable[[Document, int], Decision]:
    whole = place.whole(number)
    verdicts = np.load(place.verdicts(number, len(whole.rounds) - 1), mmap_mode="r")
    if len(verdicts) == 0:
        return lambda document, where: document
    return lambda document, where: whole.apply(document, where, verdicts)


def _alone(decide: Decide) -> Callable[[Document, int], Decision]:
    return lambda document, where: decide(document)


def _decide(
    deciders: Deciders, where: int, document: Document, counts: Counts, output: _Output
) -> Document | None:
    """Take a document through the steps of a pass; None where one of them dropped it."""
    for number, step, decide in deciders:
        if not step.takes(document):
            continue
        start = time.perf_counter()
        decision = _guarded(decide, document, where)
        counts.step(number, document, decision, time.perf_counter() - start)
        if isinstance(decision, Dropped):
            output.drop(number, document, decision)
            return None
        document = decision
    return document


def _guarded(
    decide: Callable[[Document, int], Decision], document: Document, where: int
) -> Decision:
    """What a step says. A step that raises drops the document, counted, and the run goes on."""
    try:
        decision = decide(document, where)
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        return Dropped(FAILED, f"{type(error).__name__}: {error}"[:200])
    if isinstance(decision, Document) and not valid_text(decision):
        return Dropped(NOT_UNICODE)
    return decision


# --- rounds of a corpus step ----------------------------------------------------------------------


def do_round_shard(item: ShardWork) -> ShardWork:
    """Collect the records of a later round from a shard that the pass has left."""
    place = item.place
    step = passes_of(place.curation)[item.number].then
    assert step is not None
    final = place.round(step, item.round) / f"shard-{item.shard:05d}"
    if (final / DONE).exists():
        return item
    aside = _aside(final)
    round_ = place.whole(step).rounds[item.round]
    known = np.load(place.verdicts(step, item.round - 1), mmap_mode="r")
    runs = RunWriter(aside / "records", round_)
    counts, start = Counts(), time.perf_counter()
    source = place.shard(item.number, item.shard) / "kept.parquet"
    for row, document in enumerate(read_documents(source)):
        if place.curation.steps[step].takes(document):
            runs.add(round_.records(document, _place_of(item.shard, row), known))
    runs.close()
    counts.spend(step, time.perf_counter() - start)
    (aside / DONE).write_text(json.dumps(counts.data, sort_keys=True))
    _publish(aside, final)
    return item


def runs_of(place: Place, stage: Pass, number: int) -> list[Path]:
    """The runs of a round: the first was collected by the pass, later ones on their own."""
    assert stage.then is not None
    folder = place.stage(stage.number) if number == 0 else place.round(stage.then, number)
    return runs_under(folder)


def do_range(item: RangeWork) -> RangeWork:
    """Settle a range of the records of a round."""
    step = item.stage.then
    assert step is not None
    final = item.place.round(step, item.round) / f"found-{item.number:04d}.npy"
    if not final.exists():
        records = records_of(runs_of(item.place, item.stage, item.round), item.start, item.end)
        _save(final, item.place.whole(step).rounds[item.round].settle(records))
    return item


def do_union(item: UnionWork) -> UnionWork:
    """Unite what the ranges of a round found into its verdicts."""
    final = item.place.verdicts(item.step, item.round)
    if final.exists():
        return item
    folder = item.place.round(item.step, item.round)
    round_ = item.place.whole(item.step).rounds[item.round]
    found: np.ndarray | None = None
    for i in range(item.ranges):
        part = np.load(folder / f"found-{i:04d}.npy")
        if len(part):
            found = round_.condense(part if found is None else np.concatenate([found, part]))
    if found is None:
        _save(final, np.zeros(0, [("hash", np.uint64)]))
        return item
    verdicts = round_.unite(found)
    first = (verdicts.dtype.names or ("",))[0]
    _save(final, verdicts[np.argsort(verdicts[first], kind="stable")])
    return item


def _save(final: Path, array: np.ndarray) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f"{final.stem}.part-{os.getpid()}.npy")
    # A view of some fields, or of fields in another order, has no dtype that a file can say.
    np.save(aside, repack_fields(array))
    aside.replace(final)


def read_counts(place: Place) -> list[Any]:
    """The counts of all finished shards of passes and rounds."""
    done = [*place.work().glob(f"pass-*/shard-*/{DONE}"), *place.work().glob(f"*/*/shard-*/{DONE}")]
    return [json.loads(path.read_text()) for path in sorted(done)]
