"""Small readers and steps with which the pipeline is tested: every kind of step, nothing random.

A recipe names them as a user names his own: by this file.
"""

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moebius.curate.document import Document, Dropped, Unread
from moebius.curate.read import Reader, Task, split_tasks
from moebius.curate.step import CorpusStep, Decide, Decision, Filter, Round, Whole, look_up
from moebius.curate.text import hash_of


@dataclasses.dataclass(frozen=True)
class Lines(Reader):
    """A folder of text files; each line is a document, an empty one is unread."""

    def tasks(self, task_bytes: int) -> tuple[list[Task], list[Unread]]:
        files = sorted(Path(self.path).glob("*.txt"))
        if not files:
            raise ValueError(f"no .txt file in {self.path!r}")
        return split_tasks([(file.name, file.stat().st_size) for file in files], task_bytes), []

    def read(self, task: Task) -> Iterator[Document | Unread]:
        for name in task.files:
            for row, line in enumerate(Path(self.path, name).read_text().splitlines()):
                key = f"{name}#{row}"
                yield Document(key, line) if line else Unread(key, "empty line", 1)


@dataclasses.dataclass(frozen=True)
class Short(Filter):
    """Drops what has fewer than `words` words, puts the rest in lower case, fails on `boom`."""

    words: int = 3

    def build(self) -> Decide:
        def decide(document: Document) -> Decision:
            if "boom" in document.text:
                raise LookupError("no such thing")
            if len(document.text.split()) < self.words:
                return Dropped("too short", document.text)
            return document.with_text(document.text.lower(), "short")

        return decide


@dataclasses.dataclass(frozen=True)
class Killing(Filter):
    """Ends its own process with SIGKILL on the word `kill`, as often as it may: once a file."""

    once: str = ""

    def build(self) -> Decide:
        def decide(document: Document) -> Decision:
            mark = Path(self.once)
            if "kill" in document.text and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return document

        return decide


class _First(Round):
    def records(self, document: Document, place: int, known: np.ndarray | None) -> np.ndarray:
        dtype = [("hash", np.uint64), ("place", np.uint64)]
        return np.array([(hash_of(document.text), place)], dtype)

    def settle(self, records: np.ndarray) -> np.ndarray:
        repeated = np.flatnonzero(records["hash"][1:] == records["hash"][:-1]) + 1
        return records[repeated][["place", "hash"]].copy()


class _Same(Whole):
    def __init__(self) -> None:
        self.rounds = (_First(),)

    def apply(self, document: Document, place: int, verdicts: np.ndarray) -> Decision:
        return document if look_up(verdicts, place) is None else Dropped("seen before")


@dataclasses.dataclass(frozen=True)
class Same(CorpusStep):
    """Keeps the first of equal texts."""

    def build(self) -> Whole:
        return _Same()


WORD = [("hash", np.uint64), ("count", np.int64)]


class _Count(Round):
    """How often each word occurs in the corpus."""

    def records(self, document: Document, place: int, known: np.ndarray | None) -> np.ndarray:
        return np.array([(hash_of(word), 1) for word in document.text.split()], WORD)

    def combine(self, records: np.ndarray) -> np.ndarray:
        hashes, starts = np.unique(records["hash"], return_index=True)
        out = np.zeros(len(hashes), WORD)
        out["hash"], out["count"] = hashes, np.add.reduceat(records["count"], starts)
        return out

    def settle(self, records: np.ndarray) -> np.ndarray:
        return self.combine(records)


class _Rare(Round):
    """Documents in which some word is the corpus's only one."""

    def records(self, document: Document, place: int, known: np.ndarray | None) -> np.ndarray:
        assert known is not None
        found = [look_up(known, hash_of(word)) for word in document.text.split()]
        lonely = sum(1 for record in found if record is not None and record["count"] == 1)
        return np.array([(place, lonely)] if lonely else [], WORD)

    def settle(self, records: np.ndarray) -> np.ndarray:
        return records


class _Lonely(Whole):
    def __init__(self) -> None:
        self.rounds = (_Count(), _Rare())

    def apply(self, document: Document, place: int, verdicts: np.ndarray) -> Decision:
        found = look_up(verdicts, place)
        return document if found is None else Dropped("a lonely word", str(found["count"]))


@dataclasses.dataclass(frozen=True)
class Lonely(CorpusStep):
    """Drops documents with a word that occurs nowhere else: two rounds."""

    def build(self) -> Whole:
        return _Lonely()
