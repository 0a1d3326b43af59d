"""Tensors as safetensors files, streamed: no second copy of the weights in memory.

The format (huggingface/safetensors): 8 bytes of header length, a JSON header of name -> dtype,
shape, offsets, then the raw bytes without gaps. Wide dtypes come first, so that all are aligned.
A tensor may be lazy: it is made when its bytes are due, and let go of at once.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open

from moebius.checkpoint.files import CHUNK_BYTES
from moebius.checkpoint.manifest import CheckpointError

MAX_FILE_BYTES = 2 << 30

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPE_OF = {name: dtype for dtype, name in _DTYPES.items()}

# What a fragment is called: its tensor's name, and where its first row and column lie there.
_FRAGMENT = re.compile(r"(?P<name>.*)\[(?P<row>\d+):,(?P<column>\d+):\]", re.DOTALL)


@final
@dataclass(frozen=True)
class Lazy:
    """A tensor that is not there yet; `make` must give one of this dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes it will have."""
        return math.prod(self.shape) * self.dtype.itemsize


def entry_name(name: str, row: int, column: int) -> str:
    """What the fragment of a tensor is called that begins there: `name[512:,0:]`."""
    return f"{name}[{row}:,{column}:]"


def place_of(entry: str) -> tuple[str, int, int]:
    """The name of the tensor that an entry is of, and the entry's first row and column there."""
    match = _FRAGMENT.fullmatch(entry)
    return (match["name"], int(match["row"]), int(match["column"])) if match else (entry, 0, 0)


@final
@dataclass(frozen=True)
class TensorFile:
    """One file to be written: its name, its tensors in the order of their bytes, and texts that
    stand in its header.
    """

    name: str
    tensors: Mapping[str, Lazy]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def header(self) -> bytes:
        """The length and the JSON that precede the tensors' bytes."""
        entries: dict[str, Any] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        offset = 0
        for name, dtype, shape in self.describe():
            end = offset + self.tensors[name].nbytes
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def describe(self) -> list[tuple[str, str, list[int]]]:
        """Name, dtype and shape of each tensor."""
        return [(name, _DTYPES[x.dtype], list(x.shape)) for name, x in self.tensors.items()]

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The file's bytes, piece by piece; one tensor at a time is copied, and only if need be."""
        yield self.header()
        for name, lazy in self.tensors.items():
            yield from _chunks(name, lazy)

    def num_bytes(self) -> int:
        """The size of the file."""
        return len(self.header()) + sum(x.nbytes for x in self.tensors.values())


def _chunks(name: str, lazy: Lazy) -> Iterator[memoryview]:
    """The bytes of one tensor, which is gone when they are through."""
    x = lazy.make()
    assert (x.dtype, tuple(x.shape)) == (lazy.dtype, lazy.shape), name
    raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    del x
    for start in range(0, len(raw), CHUNK_BYTES):
        yield raw[start : start + CHUNK_BYTES]


def grouped(tensors: Mapping[str, torch.Tensor | Lazy], limit: int) -> list[dict[str, Lazy]]:
    """Split tensors over groups of at most `limit` bytes (a larger tensor gets its own)."""
    lazy = {name: _checked(name, x) for name, x in tensors.items()}
    groups: list[dict[str, Lazy]] = [{}]
    size = 0
    for name in sorted(lazy, key=lambda name: (-lazy[name].dtype.itemsize, name)):
        if groups[-1] and size + lazy[name].nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = lazy[name]
        size += lazy[name].nbytes
    return groups


def plan_files(
    tensors: Mapping[str, torch.Tensor | Lazy], stem: str = "tensors"
) -> list[TensorFile]:
    """The files of a checkpoint, of at most `MAX_FILE_BYTES` each."""
    groups = grouped(tensors, MAX_FILE_BYTES)
    if len(groups) == 1:
        return [TensorFile(f"{stem}.safetensors", groups[0])]
    numbered = enumerate(groups, start=1)
    return [TensorFile(f"{stem}-{i:05d}.safetensors", group) for i, group in numbered]


def _checked(name: str, x: torch.Tensor | Lazy) -> Lazy:
    if name == "__metadata__":
        raise CheckpointError("no tensor can be named '__metadata__'; safetensors reserves it")
    if x.dtype not in _DTYPES:
        raise CheckpointError(f"tensor {name!r}: safetensors has no {x.dtype}; store a view of it")
    if isinstance(x, Lazy):
        return x
    if x.layout != torch.strided or x.is_meta:
        raise CheckpointError(
            f"tensor {name!r} has no plain bytes to save ({x.layout}, {x.device})"
        )
    return Lazy(x.dtype, tuple(x.shape), lambda: x)


def describe_file(path: Path) -> list[tuple[str, str, list[int]]]:
    """Name, dtype and shape of each tensor that a written file holds."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return [(name, x.get_dtype(), list(x.get_shape())) for name, x in slices.items()]
