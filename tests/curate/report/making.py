"""Output folders of curations that never ran, for the tests of the report."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

COLUMNS = ("key", "text", "source", "kind", "url", "date", "language")


@dataclass
class Made:
    """A curation's folder in the making: rows kept, and rows dropped by (step, reason)."""

    steps: Sequence[str]
    kept: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)
    changed: dict[int, int] = field(default_factory=dict)
    unread: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def write(self, folder: Path, files: int = 2, rows_a_group: int = 50) -> Path:
        """Write the folder as a finished curation has it."""
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(files):
            write_rows(folder / f"documents/part-{i}.parquet", self.kept[i::files], rows_a_group)
        for step, name in enumerate(self.steps):
            rows = [{**row, "reason": why} for at, why, row in self.dropped if at == step]
            for i in range(files):
                path = folder / f"dropped/{step + 1:02d}-{name}/part-{i}.parquet"
                write_rows(path, rows[i::files], rows_a_group)
        (folder / "counts.json").write_text(json.dumps(self.counts()))
        timed = [{"name": name, "documents": 9, "seconds": 0.5} for name in self.steps]
        timing = {"steps": timed, "seconds": 12.5, "engine": "local"}
        (folder / "timing.json").write_text(json.dumps(timing))
        return folder

    def counts(self) -> dict[str, Any]:
        """What `counts.json` says of these rows."""
        rows = [*self.kept, *(row for _, _, row in self.dropped)]
        steps = []
        for step, name in enumerate(self.steps):
            gone = [(why, row) for at, why, row in self.dropped if at == step]
            inside = [*self.kept, *(row for at, _, row in self.dropped if at >= step)]
            left = [*self.kept, *(row for at, _, row in self.dropped if at > step)]
            by_source = {
                name: {"in": pair(inside, name), "out": pair(left, name)}
                for name in sorted({row["source"] for row in inside})
            }
            reasons = sorted({why for why, _ in gone})
            steps.append(
                {
                    "name": name,
                    "in": pair(inside),
                    "out": pair(left),
                    "changed": self.changed.get(step, 0),
                    "dropped": {r: pair([row for why, row in gone if why == r]) for r in reasons},
                    "by_source": by_source,
                }
            )
        keys = {"by_source": "source", "by_language": "language", "by_kind": "kind"}
        kept = {
            by: {value: pair(self.kept, value, key) for value in {r[key] for r in self.kept}}
            for by, key in keys.items()
        }
        documents, num_bytes = pair(self.kept)
        sources = {}
        for name in sorted({row["source"] for row in rows}):
            sources[name] = dict(zip(("documents", "bytes"), pair(rows, name), strict=True))
        total = {"documents": documents, "bytes": num_bytes, **kept}
        return {"sources": sources, "unread": self.unread, "steps": steps, "kept": total}


def pair(rows: Sequence[Mapping[str, Any]], value: str = "", key: str = "source") -> list[int]:
    """How many of the rows have a value, and their bytes."""
    found = [row for row in rows if not value or row[key] == value]
    return [len(found), sum(len(row.get("raw") or row["text"].encode()) for row in found)]


def row(key: str, text: str, **more: Any) -> dict[str, Any]:
    """A document's columns."""
    known = {"source": "web", "kind": "web", "url": "", "date": "", "language": "eng"}
    told = {"scores": {}, "labels": {}, "lineage": [], **more}
    for name in ("scores", "labels", "lineage"):
        told[name] = json.dumps(told[name])
    return {"key": key, "text": text, **known, **told}


def write_rows(path: Path, rows: list[dict[str, Any]], rows_a_group: int = 50) -> None:
    """A parquet file; none where there are no rows."""
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs the curate extra")
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet needs the curate extra")
    if rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        names = list(dict.fromkeys(name for one in rows for name in one))
        table = pyarrow.table({name: [one.get(name) for one in rows] for name in names})
        parquet.write_table(table, path, row_group_size=rows_a_group)


def random_made(steps: int, reasons: int, documents: int, seed: int = 0) -> Made:
    """Documents dropped at random steps for random reasons; a half is kept."""
    chance = random.Random(seed)
    names = [f"step_{i}" for i in range(steps)]
    made = Made(names)
    for i in range(documents):
        words = " ".join(
            chance.choices(["lion", "river", "naïve", "漢字", "<b>", "&"], k=1 + i % 90)
        )
        one = row(
            f"doc-{i}",
            words,
            source=chance.choice(["web", "books", "code"]),
            language=chance.choice(["eng", "fra", "zho", ""]),
            scores={"quality": chance.random()},
        )
        if steps and chance.random() < 0.5:
            step = chance.randrange(steps)
            made.dropped.append((step, f"reason {step}-{chance.randrange(reasons)}", one))
        else:
            made.kept.append(one)
    return made
