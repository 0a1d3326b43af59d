"""Token shards on disk: written aside and renamed, read by memory map.

A part is what one writer leaves: for each side (train, heldout) `NAME.bin` (tokens of the documents
one after the other, each opened by `<|document|>`), `NAME.index.npy` (one row a document and one
more: where its tokens, its text bytes and its key begin) and `NAME.keys`. A part exists when its
`NAME.json` (counts and hashes) does; that file is written last.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SIDES = ("train", "heldout")
ASIDE = ".part"


def write_aside(path: Path, data: bytes) -> None:
    """Write a file so that it is complete or absent."""
    aside = path.with_name(path.name + ASIDE)
    with aside.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)


class PartWriter:
    """Collects the documents of one part; nothing counts before `close`. Final."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, document: int) -> None:
        self._folder, self._name, self._dtype, self._document = folder, name, dtype, document
        self._tokens: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
        self._rows: dict[str, list[tuple[int, int, int]]] = {side: [] for side in SIDES}
        self._keys: dict[str, list[bytes]] = {side: [] for side in SIDES}
        self.num_documents = 0
        self.num_bytes = 0

    def add(self, held_out: bool, key: str, ids: Sequence[int], num_bytes: int) -> None:
        """Add a document: its key, the tokens of its text, and the text's length in bytes."""
        side = SIDES[held_out]
        name = key.encode("utf-8", "surrogateescape")
        self._tokens[side].append(np.array([self._document, *ids], self._dtype))
        self._rows[side].append((len(ids) + 1, num_bytes, len(name)))
        self._keys[side].append(name)
        self.num_documents += 1
        self.num_bytes += num_bytes

    def close(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write the part; returns its counts and hashes, `facts` among them."""
        summary: dict[str, Any] = {"name": self._name, "documents": self.num_documents, **facts}
        for side in SIDES:
            index = np.zeros((len(self._rows[side]) + 1, 3), np.int64)
            if self._rows[side]:
                np.cumsum(np.array(self._rows[side], np.int64), axis=0, out=index[1:])
            tokens = np.concatenate(self._tokens[side] or [np.zeros(0, self._dtype)])
            contents = {
                ".bin": tokens.tobytes(),
                ".index.npy": _npy(index),
                ".keys": b"".join(self._keys[side]),
            }
            digest = hashlib.sha256()
            for ending, data in contents.items():
                write_aside(self._folder / side / (self._name + ending), data)
                digest.update(len(data).to_bytes(8, "little") + data)
            summary[side] = {
                "documents": len(index) - 1,
                "tokens": int(index[-1, 0]),
                "bytes": int(index[-1, 1]),
                "sha256": digest.hexdigest(),
                "sizes": {ending: len(data) for ending, data in contents.items()},
            }
        text = json.dumps(summary, indent=1)
        write_aside(self._folder / f"{self._name}.json", text.encode())
        return summary


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def read_part(folder: Path, name: str) -> dict[str, Any] | None:
    """The summary of a finished part whose files are all there, else None."""
    try:
        summary = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if part_is_whole(folder, summary) else None


def part_is_whole(folder: Path, summary: dict[str, Any]) -> bool:
    """Whether a part's files are there in their full length."""
    for side in SIDES:
        for ending, size in summary[side]["sizes"].items():
            try:
                if (folder / side / (summary["name"] + ending)).stat().st_size != size:
                    return False
            except OSError:
                return False
    return True


class Shards:
    """The documents of one side of one source, by number, read in place. Final."""

    def __init__(self, folder: Path, side: str, parts: list[dict[str, Any]], dtype: str) -> None:
        full = [part for part in parts if part[side]["documents"]]
        stems = [folder / side / part["name"] for part in full]
        self._bins = [np.memmap(f"{stem}.bin", dtype=dtype, mode="r") for stem in stems]
        self._indices = [np.load(f"{stem}.index.npy", mmap_mode="r") for stem in stems]
        self._keys = [Path(f"{stem}.keys") for stem in stems]
        counts = [part[side]["documents"] for part in full]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        lengths = [np.diff(index[:, 0]) for index in self._indices]
        self.lengths_D: np.ndarray = np.concatenate([np.zeros(0, np.int64), *lengths])
        self.num_documents = len(self.lengths_D)
        self.num_tokens = int(self.lengths_D.sum())
        self.num_bytes = sum(part[side]["bytes"] for part in full)

    def _place(self, document: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, document, "right")) - 1
        return part, document - int(self._starts[part])

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens of a document, `<|document|>` first; `start` and `stop` count from there."""
        part, row = self._place(document)
        begin, end = (int(value) for value in self._indices[part][row : row + 2, 0])
        return self._bins[part][begin + start : end if stop is None else min(begin + stop, end)]

    def key(self, document: int) -> str:
        """The key of a document."""
        part, row = self._place(document)
        begin, end = (int(value) for value in self._indices[part][row : row + 2, 2])
        with self._keys[part].open("rb") as stream:
            stream.seek(begin)
            return stream.read(end - begin).decode("utf-8", "surrogateescape")

    def document_bytes(self, document: int) -> int:
        """The length of a document's text in bytes."""
        part, row = self._place(document)
        begin, end = self._indices[part][row : row + 2, 1]
        return int(end - begin)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.num_documents))
