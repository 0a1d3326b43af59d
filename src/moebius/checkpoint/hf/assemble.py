"""Tensors of ours made from theirs, and theirs from ours, in parts, so that little more than the
tensor being made is in memory.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from moebius.checkpoint.hf.layout import Entry, Layout, Piece
from moebius.checkpoint.hf.matching import theirs_of
from moebius.checkpoint.stored import Readable, blank
from moebius.checkpoint.tensors import Lazy

# A part that is read and turned at a time, in bytes, where a turn can go by rows.
PART_BYTES = 1 << 20
# Numbers that are looked at at a time; a mask of a whole tensor might be half as large as it.
CHECKED = 1 << 16


def ours(layout: Layout, sources: Mapping[str, Readable]) -> dict[str, Lazy]:
    """All tensors of ours by name, made when asked for, in the dtype of their pieces."""
    made: dict[str, Lazy] = {}
    for entry in layout.entries:
        dtype = torch.float32 if not entry.pieces else sources[entry.pieces[0].theirs].dtype
        for piece in entry.pieces:
            dtype = torch.promote_types(dtype, sources[piece.theirs].dtype)
        make = partial(_make_ours, entry, sources, dtype)
        made[entry.ours] = Lazy(dtype, entry.shape, make)
    return made


def watched(tensors: Mapping[str, Lazy], odd: Counter[str]) -> dict[str, Lazy]:
    """The same tensors; `odd` will count, by name, the numbers in them that are not finite."""

    def make(name: str, lazy: Lazy) -> Tensor:
        made = lazy.make()
        parts = made.flatten().split(CHECKED)
        count = sum(int(part.isfinite().logical_not_().sum()) for part in parts)
        if count:
            odd[name] = count
        return made

    return {
        name: Lazy(lazy.dtype, lazy.shape, partial(make, name, lazy))
        for name, lazy in tensors.items()
    }


def _make_ours(entry: Entry, sources: Mapping[str, Readable], dtype: torch.dtype) -> Tensor:
    out = blank(entry.shape, dtype)
    if entry.fill:
        out.fill_(entry.fill)
    for piece in entry.pieces:
        view = out[piece.at] if piece.at else out
        source = sources[piece.theirs]
        for rows, theirs in _parts(piece, source, piece.shape, piece.part):
            part = view if rows is None else view[rows]
            part.copy_(piece.turn.into(theirs))
    return out


def theirs(
    layout: Layout, sources: Mapping[str, Readable], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Lazy]:
    """All tensors of theirs by name, made when asked for; `dtypes` says what they are to be."""
    made: dict[str, Lazy] = {}
    for name, pieces in theirs_of(layout).items():
        make = partial(_make_theirs, pieces, sources, dtypes[name])
        made[name] = Lazy(dtypes[name], pieces[0][1].shape, make)
    for name, shape, dtype in layout.filled:
        made[name] = Lazy(dtype, shape, partial(blank, shape, dtype))
    return made


def _make_theirs(
    pieces: list[tuple[Entry, Piece]], sources: Mapping[str, Readable], dtype: torch.dtype
) -> Tensor:
    out = blank(pieces[0][1].shape, dtype)
    for entry, piece in pieces:
        view = out if piece.part is None else out[piece.part]
        source, first, rest = sources[entry.ours], piece.at[:1], piece.at[1:]
        for rows, mine in _parts(piece, source, entry.shape, first[0] if first else None):
            part = view if rows is None else view[rows]
            cut = rest if rows is None else (slice(None), *rest)
            part.copy_(piece.turn.back(mine[cut] if rest else mine))
    return out


def _parts(
    piece: Piece, source: Readable, shape: tuple[int, ...], where: int | slice | None
) -> Iterator[tuple[slice | None, Tensor]]:
    """What stands at `where` of a source, with its rows there, in parts if the turn allows."""
    if isinstance(where, int):
        yield None, source.rows(where, where + 1)[0]
        return
    if not shape:
        yield None, source.whole()
        return
    chosen = range(shape[0]) if where is None else range(shape[0])[where]
    count, granule = len(chosen), piece.turn.granule
    row_bytes = math.prod(shape[1:]) * source.dtype.itemsize
    step = max(1, PART_BYTES // max(1, row_bytes * granule)) * granule if granule else count
    for start in range(0, count, max(1, step)):
        stop = min(count, start + step)
        yield slice(start, stop), source.rows(chosen.start + start, chosen.start + stop)
