"""The plan of a curation, and where each piece of work lies on disk.

Steps are cut into passes over the documents: a pass begins with a corpus step's decision (the first
with reading) and goes on with filters up to the next corpus step, whose first records it collects.
A piece of work is a folder or file that is written aside and renamed, so it is whole or absent.
"""

import dataclasses
import functools
import json
from pathlib import Path

from moebius.config import from_json
from moebius.curate.config import Curation
from moebius.curate.read import Task
from moebius.curate.step import CorpusStep, Decide, Filter, Whole


@dataclasses.dataclass(frozen=True)
class Pass:
    """Steps `first` to `last` (exclusive) in one pass; `then` is the corpus step after it."""

    number: int
    first: int
    last: int
    then: int | None


def passes_of(curation: Curation) -> list[Pass]:
    """The passes of a curation; the last has no corpus step after it."""
    corpus = [i for i, step in enumerate(curation.steps) if isinstance(step, CorpusStep)]
    firsts, lasts = [0, *corpus], [*corpus, len(curation.steps)]
    thens: list[int | None] = [*corpus, None]
    rows = enumerate(zip(firsts, lasts, thens, strict=True))
    return [Pass(number, first, last, then) for number, (first, last, then) in rows]


def step_name(curation: Curation, step: int) -> str:
    """`03-gopher_quality`: the place of a step in the list, from 1, and its name in the table."""
    cls = type(curation.steps[step])
    spec = f"{cls.__module__}:{cls.__qualname__}"
    named = next((name for name, place in cls.TABLE.items() if place == spec), cls.__qualname__)
    return f"{step + 1:02d}-{named}"


@dataclasses.dataclass(frozen=True)
class Place:
    """The folder of a curation. `recipe` is its config as JSON text, so that workers share it."""

    folder: Path
    recipe: str

    @property
    def curation(self) -> Curation:
        return _curation(self.recipe)

    def tasks(self) -> list[tuple[int, Task]]:
        """The source and the files of every shard, as they were listed at the start."""
        listed = json.loads((self.folder / "tasks.json").read_text())
        return [(i, Task(tuple(files), size)) for i, files, size in listed]

    def work(self) -> Path:
        return self.folder / "work"

    def stage(self, number: int) -> Path:
        """Where a pass leaves its shards."""
        return self.work() / f"pass-{number:02d}"

    def shard(self, number: int, shard: int) -> Path:
        return self.stage(number) / f"shard-{shard:05d}"

    def round(self, step: int, number: int) -> Path:
        """Where a round of a corpus step leaves what it found."""
        return self.work() / f"step-{step + 1:02d}" / f"round-{number}"

    def verdicts(self, step: int, number: int) -> Path:
        return self.round(step, number) / "verdicts.npy"

    def filter(self, step: int) -> Decide:
        """The decision of a filter, built once in each process."""
        return _filter(self.recipe, step)

    def whole(self, step: int) -> Whole:
        """A corpus step, built once in each process."""
        return _whole(self.recipe, step)


@functools.lru_cache(maxsize=2)
def _curation(recipe: str) -> Curation:
    return from_json(Curation, json.loads(recipe))


@functools.lru_cache(maxsize=64)
def _filter(recipe: str, step: int) -> Decide:
    config = _curation(recipe).steps[step]
    assert isinstance(config, Filter)
    return config.build()


@functools.lru_cache(maxsize=16)
def _whole(recipe: str, step: int) -> Whole:
    config = _curation(recipe).steps[step]
    assert isinstance(config, CorpusStep)
    return config.build()
