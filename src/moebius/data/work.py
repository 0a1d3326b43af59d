"""Tokenising: groups of files -> parts, by threads, going on where a killed preparation stopped.

A group leaves parts of some 16 MiB of text whose content depends on nothing but the group. Encoding
frees the GIL, so threads are enough. Going on after a kill, a group reads past the documents of its
finished parts without encoding them.
"""

import copy
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moebius.data.config import DataConfig
from moebius.data.corpus import Budget, documents_of, groups_of
from moebius.data.documents import Corpus, Document, File, Split, Tally
from moebius.data.shards import SIDES, PartWriter, read_part
from moebius.data.tokenizer import Tokenizer

PART_BYTES = 16 << 20
BATCH_BYTES = 1 << 20

Progress = Callable[[str, int, int], None]


class Stopped(Exception):
    """Ends the threads that are still at work when another has failed, or at Ctrl-C."""


@dataclass
class Meter:
    """Progress over all threads, told by the percent."""

    report: Progress | None
    stage: str
    total: int
    done: int = 0
    told: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, num_bytes: int) -> None:
        """Count some bytes; from any thread."""
        with self.lock:
            self.done = min(self.done + num_bytes, self.total)
            if self.report is not None and (self.done - self.told) * 100 >= self.total:
                self.told = self.done
                self.report(self.stage, self.done, self.total)

    def finish(self) -> None:
        """Tell that all is done; what was left aside counts as done, too."""
        self.add(self.total)
        if self.report is not None and self.told < self.total:
            self.report(self.stage, self.total, self.total)


@dataclass(frozen=True)
class _Task:
    """Groups that one thread does in order; several only where they share a budget."""

    source: int
    corpus: Corpus
    split: Split
    groups: list[tuple[int, tuple[File, ...]]]
    budget: Budget


@dataclass(frozen=True)
class Work:
    """Tokenising: what all threads share."""

    config: DataConfig
    folder: Path
    tokenizer: Tokenizer
    dtype: np.dtype
    meter: Meter
    part_bytes: int = PART_BYTES
    batch_bytes: int = BATCH_BYTES
    stop: threading.Event = field(default_factory=threading.Event)

    def sources(self, corpora: list[Corpus], splits: list[Split]) -> list[dict[str, Any]]:
        """Tokenise all sources; the manifest entry of each."""
        tasks = []
        for i, (corpus, split) in enumerate(zip(corpora, splits, strict=True)):
            for side in SIDES:
                (self.folder / f"source-{i}" / side).mkdir(parents=True, exist_ok=True)
            groups = list(enumerate(groups_of(corpus.files)))
            capped = self.config.max_bytes is not None
            for share in [groups] if capped else [[group] for group in groups]:
                budget = Budget(self.config.max_bytes)
                tasks.append(_Task(i, corpus, split, share, budget))
        pool = ThreadPoolExecutor(self.config.num_workers())
        try:
            done = list(pool.map(self._task, tasks))
        finally:
            self.stop.set()
            pool.shutdown(cancel_futures=True)
        self.meter.finish()
        return [
            self._entry(corpus, [d for t, d in zip(tasks, done, strict=True) if t.source == i])
            for i, corpus in enumerate(corpora)
        ]

    def _entry(self, corpus: Corpus, done: list[list[dict[str, Any]]]) -> dict[str, Any]:
        parts = [part for task in done for part in task]
        tally = Tally()
        tally.add(corpus.passed_over.skipped, corpus.passed_over.split)
        for part in parts:
            if part["last"]:
                tally.add(part["skipped"], part["split"])
        counts = ("documents", "tokens", "bytes")
        totals = {side: {c: sum(part[side][c] for part in parts) for c in counts} for side in SIDES}
        return {
            "name": corpus.name,
            "files": len(corpus.files),
            **totals,
            "skipped": {reason: tally.skipped[reason] for reason in sorted(tally.skipped)},
            "split": tally.split,
            "parts": parts,
        }

    def _task(self, task: _Task) -> list[dict[str, Any]]:
        return [part for number, files in task.groups for part in self._group(task, number, files)]

    def _group(self, task: _Task, number: int, files: tuple[File, ...]) -> list[dict[str, Any]]:
        """The parts of a group: those found finished, then the rest."""
        folder = self.folder / f"source-{task.source}"
        names = (f"{number:05d}-{piece:04d}" for piece in itertools.count())
        parts: list[dict[str, Any]] = []
        name = next(names)
        while (part := read_part(folder, name)) is not None:
            parts.append(part)
            if part["last"]:
                self.meter.add(sum(file.size for file in files))
                task.budget.take(sum(p[side]["bytes"] for p in parts for side in SIDES))
                task.budget.spent = task.budget.spent or part["spent"]
                return parts
            name = next(names)
        tally = Tally()
        documents = documents_of(files, task.corpus, self.config, task.budget, tally)
        for part in parts:
            for document in itertools.islice(documents, part["documents"]):
                self.meter.add(len(document.text.encode()))
        last = False
        while not last:
            writer = PartWriter(folder, name, self.dtype, self.tokenizer.document)
            last = not self._fill(writer, documents, task.split)
            facts = {
                "last": last,
                "spent": task.budget.spent,
                "skipped": copy.deepcopy(tally.skipped),
                "split": tally.split,
            }
            parts.append(writer.close(facts))
            name = next(names)
        return parts

    def _fill(self, writer: PartWriter, documents: Iterator[Document], split: Split) -> bool:
        """Add documents up to the size of a part; False when there are no more."""
        while writer.num_bytes < self.part_bytes:
            if self.stop.is_set():
                raise Stopped
            batch: list[Document] = []
            sizes: list[int] = []
            room = self.batch_bytes
            for document in documents:
                batch.append(document)
                sizes.append(len(document.text.encode()))
                room -= sizes[-1]
                if room <= 0:
                    break
            if not batch:
                return False
            encoded = self.tokenizer.encode_batch([document.text for document in batch])
            for document, ids, num_bytes in zip(batch, encoded, sizes, strict=True):
                writer.add(split.held_out(document.origin), document.key, ids, num_bytes)
            self.meter.add(sum(sizes))
        return True
