"""Tensors of safetensors files, read one by one and row by row, straight into their memory.

No file is mapped: pages of a map count as resident until it is closed, and a shard may be larger
than all that is to be held. A file's header is checked against its size before anything is read.
"""

import json
import math
import mmap
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from moebius.checkpoint.manifest import MANIFEST, STATE, CheckpointError, parse
from moebius.checkpoint.tensors import DTYPE_OF, place_of

_MAX_HEADER = 100 << 20
# From here on a tensor's memory comes from the kernel and goes back to it at once.
_LARGE = 1 << 20


def blank(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros that leaves nothing behind when it is let go: freed memory that malloc
    keeps for later may be as large as the tensor was.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _LARGE:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8).view(dtype).view(shape)


class Readable(ABC):
    """A tensor that is read when asked for, whole or some rows of its first dim."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of what is read."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the first dim; the caller owns what it gets."""

    @abstractmethod
    def whole(self) -> Tensor:
        """All of it."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Rows by a slice, as of a tensor."""
        start, stop, _ = rows.indices(self.shape[0])
        return self.rows(start, stop)


@final
@dataclass(frozen=True)
class Stored(Readable):
    """A tensor in a file, `offset` bytes from its start."""

    path: Path
    kind: torch.dtype
    size: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> torch.dtype:
        return self.kind

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def num_bytes(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.size) * self.kind.itemsize

    def rows(self, start: int, stop: int) -> Tensor:
        row = math.prod(self.size[1:]) * self.kind.itemsize
        return self._read((stop - start, *self.size[1:]), self.offset + start * row)

    def whole(self) -> Tensor:
        return self._read(self.size, self.offset)

    def _read(self, shape: tuple[int, ...], offset: int) -> Tensor:
        out = blank(shape, self.kind)
        raw = out.reshape(-1).view(torch.uint8).numpy().data
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(raw):
                count = file.readinto(raw[done:])
                if not count:
                    raise CheckpointError(f"{self.path} was cut short while it was read")
                done += count
        return out


def stored_in(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file; a CheckpointError where it is damaged or cut short."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{path} is cut short or no safetensors file; fetch it again")
            header = json.loads(file.read(length).decode(), object_pairs_hook=once)
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is damaged: its header is no JSON object")
    header.pop("__metadata__", None)
    found = {name: _stored(path, 8 + length, name, entry) for name, entry in header.items()}
    end = 8 + length
    for name, x in sorted(found.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if x.offset != end:
            raise CheckpointError(
                f"{path} is damaged: the bytes of {name} do not follow those before it"
            )
        end += x.num_bytes
    if end != size:
        raise CheckpointError(
            f"{path} has {size:,} bytes instead of the {end:,} that its header names; it is cut "
            "short or damaged: fetch it again"
        )
    return found


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError where a key stands in it twice (for `json.loads`)."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} stands in it twice")
    return found


def _stored(path: Path, base: int, name: str, entry: Any) -> Stored:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        size = tuple(shape)
        if not all(type(n) is int and n >= 0 for n in (*size, start, stop)):
            raise TypeError(name)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path} is damaged: its header has no sense at {name!r}") from None
    if not isinstance(dtype, str) or dtype not in DTYPE_OF:
        raise CheckpointError(f"{path}: {name} is of dtype {dtype!r}, which cannot be read here")
    kind = DTYPE_OF[dtype]
    found = Stored(path, kind, size, base + start)
    if stop - start != found.num_bytes:
        raise CheckpointError(f"{path} is damaged: {name} has {stop - start:,} bytes, not its size")
    return found


@final
@dataclass(frozen=True)
class Assembled(Readable):
    """A tensor that lies in fragments, each at its first row and column of the whole."""

    size: tuple[int, ...]
    fragments: tuple[tuple[int, int, Stored], ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.fragments[0][2].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def rows(self, start: int, stop: int) -> Tensor:
        out = blank((stop - start, *self.size[1:]), self.dtype)
        for row, column, stored in self.fragments:
            low, high = max(start, row), min(stop, row + stored.shape[0])
            if low < high:
                place, found = out[low - start : high - start], stored.rows(low - row, high - row)
                if found.ndim > 1:
                    place = place[:, column : column + found.shape[1]]
                place.copy_(found)
        return out

    def whole(self) -> Tensor:
        return self.rows(0, self.size[0])


def stored_tensors(path: Path) -> tuple[dict[str, Readable], dict[str, Any]]:
    """The tensors, unread, and the state of a checkpoint that has been verified."""
    manifest = parse((path / MANIFEST).read_bytes())
    tensors: dict[str, Readable] = {}
    fragments: dict[str, list[tuple[int, int, Stored]]] = {}
    for file in manifest.files:
        for entry, stored in stored_in(path / file).items() if file != STATE else ():
            name, row, column = place_of(entry)
            if name == entry:
                tensors[name] = stored
            else:
                fragments.setdefault(name, []).append((row, column, stored))
    for name, found in fragments.items():
        size = list(found[0][2].shape)
        size[0] = max(row + x.shape[0] for row, _, x in found)
        if len(size) > 1:
            size[1] = max(column + x.shape[1] for _, column, x in found)
        tensors[name] = Assembled(tuple(size), tuple(found))
    return tensors, json.loads((path / STATE).read_bytes())
