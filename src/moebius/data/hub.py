"""Datasets of the Hugging Face hub, streamed once into local rows (the `data` extra).

Rows come in the dataset's own order, from its `train` part; each local file is complete or absent
and holds some 32 MiB of them, so a fetch that was stopped goes on after its last complete file.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moebius.data.documents import Corpus, File, Tally
from moebius.data.readers import NEEDS_EXTRA, TEXT_FIELDS
from moebius.data.shards import write_aside

FILE_BYTES = 32 << 20


def open_rows(name: str, subset: str = "") -> Any:
    """The rows of a dataset, of one of its subsets by name, as an iterable with `skip`."""
    try:
        import datasets
        import datasets.exceptions
    except ImportError as error:
        raise ValueError(f"hf:{name} {NEEDS_EXTRA}") from error
    folder = Path(name)
    try:
        if any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, subset or None, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"cannot open hf:{name} ({_line(error)})") from error
    if not isinstance(found, dict):
        return found
    if "train" not in found and len(found) > 1:
        raise ValueError(
            f"hf:{name} has no part `train`, only {', '.join(sorted(map(str, found)))}"
        )
    return found["train"] if "train" in found else next(iter(found.values()))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _text(row: dict[str, Any]) -> str | None:
    value = next((row[name] for name in TEXT_FIELDS if name in row), None)
    return value if isinstance(value, str) else None


def check(corpus: Corpus) -> None:
    """Raise ValueError where the dataset cannot be opened or its first rows have no text."""
    first = itertools.islice(_iterate(corpus.hub, open_rows(corpus.hub)), 1000)
    if not any((_text(row) or "").strip() for row in first):
        raise ValueError(f"hf:{corpus.hub} has no text; its rows need {' or '.join(TEXT_FIELDS)}")


def _iterate(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read hf:{name} ({_line(error)})") from error


def fetch(
    corpus: Corpus,
    folder: Path,
    max_bytes: int | None,
    progress: Callable[[str, int, int], None] | None,
    file_bytes: int = FILE_BYTES,
) -> Corpus:
    """Stream rows into `folder`, up to `max_bytes` of text; the corpus of what is there then."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"rows": 0, "bytes": 0, "files": 0, "complete": False}
    done = folder / "fetched.json"
    if done.exists():
        state = json.loads(done.read_text(encoding="utf-8"))
    if not state["complete"]:
        rows = _iterate(corpus.hub, open_rows(corpus.hub).skip(state["rows"]))
        while not state["complete"]:
            state = _fetch_file(rows, folder, max_bytes, file_bytes, state)
            write_aside(done, json.dumps(state).encode())
            if progress is not None:
                progress("fetch", state["bytes"], max_bytes or state["bytes"])
    paths = [folder / f"{i:05d}.jsonl" for i in range(state["files"])]
    files = tuple(File(p.name, p, p.stat().st_size, 0) for p in paths)
    return replace(corpus, files=files, passed_over=Tally())


def _fetch_file(
    rows: Iterator[dict[str, Any]],
    folder: Path,
    max_bytes: int | None,
    file_bytes: int,
    state: dict[str, Any],
) -> dict[str, Any]:
    """Write one more file of rows; returns the new state."""
    lines: list[bytes] = []
    size, count, complete = 0, 0, True
    for row in rows:
        text = _text(row)
        lines.append(json.dumps({"text": text}).encode() + b"\n")
        size += len((text or "").encode("utf-8", "surrogatepass"))
        count += 1
        if max_bytes is not None and state["bytes"] + size >= max_bytes:
            break
        if size >= file_bytes:
            complete = False
            break
    write_aside(folder / f"{state['files']:05d}.jsonl", b"".join(lines))
    return {
        "rows": state["rows"] + count,
        "bytes": state["bytes"] + size,
        "files": state["files"] + 1,
        "complete": complete,
    }
