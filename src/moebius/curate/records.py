"""The records of corpus steps on disk: sorted runs, read back by ranges of their hash.

An external sort: each run is sorted by all fields and carries an index of where each of `BUCKETS`
equal ranges of hashes begins, so that a settling task reads its ranges and nothing else.
"""

from pathlib import Path

import numpy as np

from moebius.curate.step import Round

BUCKETS = 4096
RUN_BYTES = 16 << 20
# A settling task takes about this many bytes of records.
RANGE_BYTES = 16 << 20


def sort_records(records: np.ndarray) -> np.ndarray:
    """Sorted by all fields, the first foremost."""
    names = records.dtype.names or ()
    return records[np.lexsort(tuple(records[name] for name in reversed(names)))]


class RunWriter:
    """Collects records and writes sorted runs into a folder. Final."""

    def __init__(self, folder: Path, round_: Round) -> None:
        self._folder, self._round = folder, round_
        self._parts: list[np.ndarray] = []
        self._bytes = 0
        self._number = 0

    def add(self, records: np.ndarray) -> None:
        """Add the records of one document."""
        if len(records) == 0:
            return
        self._parts.append(records)
        self._bytes += records.nbytes
        if self._bytes >= RUN_BYTES:
            self.close()

    def close(self) -> None:
        """Write what is left."""
        if not self._parts:
            return
        records = self._round.combine(sort_records(np.concatenate(self._parts)))
        self._parts, self._bytes = [], 0
        bounds = np.arange(1, BUCKETS, dtype=np.uint64) << np.uint64(52)
        starts = np.searchsorted(np.ascontiguousarray(records["hash"]), bounds)
        index = np.concatenate([[0], starts, [len(records)]]).astype(np.int64)
        self._folder.mkdir(parents=True, exist_ok=True)
        np.save(self._folder / f"run-{self._number:04d}.npy", records)
        np.save(self._folder / f"index-{self._number:04d}.npy", index)
        self._number += 1


def runs_under(folder: Path) -> list[Path]:
    """All runs of a round, in a fixed order."""
    return sorted(folder.glob("shard-*/records/run-*.npy"))


def ranges_of(runs: list[Path]) -> list[tuple[int, int]]:
    """Buckets `start` to `end`, cut so that each range has about RANGE_BYTES of records."""
    sizes = np.zeros(BUCKETS, np.int64)
    for run in runs:
        width = np.load(run, mmap_mode="r").dtype.itemsize
        sizes += np.diff(np.load(_index(run))) * width
    ranges: list[tuple[int, int]] = []
    start, total = 0, 0
    for bucket in range(BUCKETS):
        if total and total + sizes[bucket] > RANGE_BYTES:
            ranges.append((start, bucket))
            start, total = bucket, 0
        total += int(sizes[bucket])
    return [*ranges, (start, BUCKETS)] if total else ranges


def _index(run: Path) -> Path:
    return run.with_name(run.name.replace("run-", "index-"))


def records_of(runs: list[Path], start: int, end: int) -> np.ndarray:
    """All records in buckets `start` to `end`, sorted by all fields; at least one run is needed."""
    parts = []
    for run in runs:
        index = np.load(_index(run))
        parts.append(np.array(np.load(run, mmap_mode="r")[index[start] : index[end]]))
    return sort_records(np.concatenate(parts))
