"""A sample of documents on disk, small whatever the corpus: some row groups of some files.

Files and row groups are taken in an order by hash, so that a page is the same every time; of what
is read a light record stays for the histograms, and per reason the few texts of lowest hash. Texts
are cut before they leave the table. A reason that no sampled row has is looked up by its column.
"""

import heapq
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

TEXT = 700
MAX_FILES = 256
_MAX_FIELD = 4000
_BATCH_BYTES = 8 << 20
_COLUMNS = ("key", "source", "kind", "url", "date", "language", "scores", "labels", "lineage")


@dataclass(frozen=True)
class Budget:
    """How much is read of one folder: rows, uncompressed bytes, examples a reason."""

    rows: int
    bytes: int
    examples: int


@dataclass(frozen=True)
class Example:
    """One document to show; `text` is its beginning, of a raw page where `raw` is true."""

    key: str
    source: str
    url: str
    date: str
    language: str
    reason: str
    detail: str
    text: str
    raw: bool
    num_bytes: int
    scores: Mapping[str, float]
    labels: Mapping[str, str]
    lineage: tuple[str, ...]


@dataclass(frozen=True)
class Light:
    """What the histograms take of a row."""

    num_bytes: int
    language: str
    scores: Mapping[str, float]


@dataclass
class Sample:
    """What was read of one folder, and what could not be."""

    rows: list[Light] = field(default_factory=list)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    files: int = 0
    unreadable: int = 0


class Sampler:
    """Reads samples of folders of parquet. Final."""

    def __init__(self) -> None:
        try:
            import pyarrow
            from pyarrow import compute, parquet
        except ImportError as error:
            raise ValueError(
                "the report needs the curate extra: pip install 'moebius[curate]'"
            ) from error
        self._damage = (OSError, ValueError, pyarrow.ArrowException)
        self._compute, self._parquet = compute, parquet

    def take(self, folder: Path, budget: Budget, reasons: Sequence[str] = ("",)) -> Sample:
        """A sample of all parquet files under a folder; of each of the reasons some examples.

        Kept documents have the reason "". An example that changed on its way stands also under
        "changed by STEP" of each step of its lineage.
        """
        sample = Sample()
        paths = sorted(folder.rglob("*.parquet"), key=lambda path: _hash(str(path.name), str(path)))
        paths = paths[:MAX_FILES]
        best: dict[str, list[tuple[int, int, Example]]] = {}
        for i, row in enumerate(itertools.islice(self._rows(paths, budget, sample), budget.rows)):
            sample.rows.append(Light(row.num_bytes, row.language, row.scores))
            for name in (row.reason, *(f"changed by {step}" for step in row.lineage)):
                _keep(best.setdefault(name, []), budget.examples, i, row)
        for name, found in best.items():
            sample.examples[name] = [row for _, _, row in sorted(found, reverse=True)]
        missing = {reason for reason in reasons if reason not in best and reason}
        for row in self._find(paths, missing):
            sample.examples[row.reason] = [row]
        return sample

    def _rows(self, paths: list[Path], budget: Budget, sample: Sample) -> Iterator[Example]:
        """Rows of row groups in an order by hash, within the budget of bytes."""
        groups: list[tuple[int, Path, int]] = []
        for path in paths:
            try:
                with self._parquet.ParquetFile(path) as table:
                    count = table.num_row_groups
            except self._damage:
                sample.unreadable += 1
                continue
            sample.files += 1
            groups += [(_hash(path.name, str(i)), path, i) for i in range(count)]
        left = budget.bytes
        for _, path, group in sorted(groups):
            if left <= 0:
                return
            try:
                with self._parquet.ParquetFile(path) as table:
                    meta = table.metadata.row_group(group)
                    left -= meta.total_byte_size
                    each = meta.total_byte_size // max(1, meta.num_rows) + 1
                    batch = max(1, min(512, _BATCH_BYTES // each))
                    columns = self._columns(table)
                    for part in table.iter_batches(batch, row_groups=[group], columns=columns):
                        yield from self._examples(part)
            except self._damage:
                sample.unreadable += 1

    def _columns(self, table: Any) -> list[str]:
        wanted = {*_COLUMNS, "text", "raw", "reason", "detail"}
        return [name for name in table.schema_arrow.names if name in wanted]

    def _examples(self, part: Any) -> Iterator[Example]:
        """The rows of a record batch, their texts cut inside the table."""
        names = part.schema.names
        texts, raws = [""] * part.num_rows, [b""] * part.num_rows
        sizes, raw_sizes = [0] * part.num_rows, [0] * part.num_rows
        if "text" in names:
            column = part.column("text")
            texts = self._compute.utf8_slice_codeunits(column, 0, TEXT + 1).to_pylist()
            sizes = self._compute.binary_length(column).to_pylist()
        if "raw" in names:
            column = part.column("raw")
            raws = self._compute.binary_slice(column, 0, TEXT + 1).to_pylist()
            raw_sizes = self._compute.binary_length(column).to_pylist()
        columns = {
            name: part.column(name).to_pylist()
            for name in (*_COLUMNS, "reason", "detail")
            if name in names
        }
        for i in range(part.num_rows):
            told = {name: str(values[i] or "")[:_MAX_FIELD] for name, values in columns.items()}
            raw = not texts[i] and bool(raws[i])
            text = (raws[i] or b"").decode("utf-8", "replace") if raw else texts[i] or ""
            yield _example(told, text, raw, int((raw_sizes if raw else sizes)[i] or 0))

    def _find(self, paths: list[Path], missing: set[str]) -> Iterator[Example]:
        """A row for each of the reasons that some file has."""
        for path in paths:
            if not missing:
                return
            try:
                with self._parquet.ParquetFile(path) as table:
                    if "reason" in table.schema_arrow.names:
                        yield from self._find_in(table, missing)
            except self._damage:
                continue

    def _find_in(self, table: Any, missing: set[str]) -> Iterator[Example]:
        for group in range(table.num_row_groups):
            reasons = table.read_row_group(group, columns=["reason"]).column("reason").to_pylist()
            first = {reason: i for i, reason in reversed(list(enumerate(reasons)))}
            here = sorted(missing & first.keys())
            if here:
                rows = table.read_row_group(group, columns=self._columns(table))
                for reason in here:
                    (part,) = rows.slice(first[reason], 1).to_batches()[:1]
                    yield from self._examples(part)
                    missing.discard(reason)


def _hash(*parts: str) -> int:
    return xxhash.xxh3_64_intdigest("\0".join(parts).encode("utf-8", "surrogatepass"))


def _keep(best: list[tuple[int, int, Example]], limit: int, place: int, row: Example) -> None:
    """Keep the rows of lowest hash; of equal ones those that came first."""
    entry = (-_hash(row.source, row.key), -place, row)
    if len(best) < limit:
        heapq.heappush(best, entry)
    elif entry[0] > best[0][0]:
        heapq.heapreplace(best, entry)


def _example(told: dict[str, str], text: str, raw: bool, num_bytes: int) -> Example:
    scores, labels = _json(told.get("scores"), {}), _json(told.get("labels"), {})
    lineage = _json(told.get("lineage"), [])
    return Example(
        key=told.get("key", ""),
        source=told.get("source", ""),
        url=told.get("url", ""),
        date=told.get("date", ""),
        language=told.get("language", ""),
        reason=told.get("reason", ""),
        detail=told.get("detail", ""),
        text=text,
        raw=raw,
        num_bytes=num_bytes,
        scores={str(n): float(x) for n, x in list(scores.items())[:64] if _finite(x)},
        labels={str(n): str(x)[:80] for n, x in list(labels.items())[:64]},
        lineage=tuple(dict.fromkeys(str(x) for x in lineage[:64])),
    )


def _json(text: str | None, empty: Any) -> Any:
    """Parsed where it is of the type of `empty`."""
    try:
        found = json.loads(text or "null")
    except (ValueError, RecursionError):
        return empty
    return found if isinstance(found, type(empty)) else empty


def _finite(value: Any) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and abs(value) < 1e300 and math.isfinite(value)
