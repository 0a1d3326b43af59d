"""Benchmarks to decontaminate against: items of the files that a user names.

A file is .jsonl or .json (with .gz or without), its items the records, or .txt, its items what
empty lines divide; a file without empty lines has one item a line. An item is checked in parts.
"""

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import regex

from moebius.config import nearest

_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".txt", ".txt.gz")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark: a file, or a folder of files, and the rule for what it shares with documents.

    `fields` are the parts of a record; `question+choices` joins two in one part. Without any, each
    text of a record is a part, and all together one more. `any`: one n-gram shared; `ratio`: at
    least the share `ratio` of a part's shorter n-grams; `exact`: a whole part.
    """

    path: str
    name: str = ""
    fields: tuple[str, ...] = ()
    rule: Literal["any", "ratio", "exact"] = "any"
    ratio: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"benchmark {self.path}: ratio must lie in (0, 1]")

    @property
    def title(self) -> str:
        """What reports call it."""
        return self.name or Path(self.path).name.partition(".")[0]


@dataclasses.dataclass(frozen=True)
class Item:
    """One item: its name (benchmark, file, number) and its parts."""

    name: str
    parts: tuple[str, ...]


def items(benchmark: Benchmark) -> Iterator[Item]:
    """All items of a benchmark in order; ValueError where a file or field is not there."""
    found = False
    for path in _files(Path(benchmark.path)):
        records = list(_records(path))
        _check_fields(benchmark, path, records)
        for number, record in enumerate(records):
            found = True
            yield Item(f"{benchmark.title} {path.name}#{number}", _parts(record, benchmark.fields))
    if not found:
        raise ValueError(f"benchmark {benchmark.path} has no items")


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        inside = sorted(path.rglob("*"))
        files = [file for file in inside if file.is_file() and file.name.endswith(_SUFFIXES)]
        if files:
            return files
    elif path.is_file() and path.name.endswith(_SUFFIXES):
        return [path]
    elif not path.exists():
        raise ValueError(f"there is no benchmark {path}")
    raise ValueError(f"benchmark {path} has no file of {', '.join(_SUFFIXES)}")


def _records(path: Path) -> list[Any]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"benchmark {path} cannot be read: {error}") from error
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "txt":
        lines = "\n".join(line.strip() for line in text.strip().splitlines())
        parts = regex.split("\n\n+" if "\n\n" in lines else "\n", lines)
        return [part for part in parts if part]
    try:
        if kind == "jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"benchmark {path} is not JSON: {error}") from error
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        data = lists[0] if len(lists) == 1 else [data]
    return data if isinstance(data, list) else [data]


def _check_fields(benchmark: Benchmark, path: Path, records: list[Any]) -> None:
    known = {key for record in records if isinstance(record, dict) for key in record}
    for field in benchmark.fields:
        for name in field.split("+"):
            if name not in known:
                raise ValueError(f"benchmark {path} has no field {name!r}{nearest(name, known)}")


def _parts(record: Any, fields: tuple[str, ...]) -> tuple[str, ...]:
    if not fields or not isinstance(record, dict):
        texts = list(_texts(record))
        return tuple(dict.fromkeys([*texts, "\n".join(texts)]))
    joined = ("\n".join(_texts([record.get(name) for name in f.split("+")])) for f in fields)
    return tuple(dict.fromkeys(part for part in joined if part))


def _texts(value: Any) -> Iterator[str]:
    """All texts inside a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
