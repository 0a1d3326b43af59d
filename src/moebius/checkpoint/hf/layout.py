"""Name maps: which tensors of a HF folder make up which of ours, and how they are turned.

An `Entry` is one tensor of `LM.state_dict()`; a `Piece` a part of it that is (a part of) one
tensor of theirs. Turns are invertible and move numbers without changing them, `Scaled` excepted.
Letters: K head width.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

Index = tuple[int | slice, ...]


class Turn(ABC):
    """An invertible rearrangement of a tensor."""

    # Rows of the first dim that turn by themselves, so that long tensors pass in parts (0: none).
    granule: int = 0

    @abstractmethod
    def into(self, theirs: Tensor) -> Tensor:
        """Ours from theirs."""

    @abstractmethod
    def back(self, ours: Tensor) -> Tensor:
        """Theirs from ours."""


@final
class Same(Turn):
    """Nothing changes."""

    granule = 1

    def into(self, theirs: Tensor) -> Tensor:
        return theirs

    def back(self, ours: Tensor) -> Tensor:
        return ours


SAME = Same()


@final
class Pairs(Turn):
    """Rotary halves of theirs (i, i + K/2) to pairs of ours (2i, 2i + 1), along the first dim,
    which holds heads of `width` rows each.
    """

    def __init__(self, width: int) -> None:
        self.granule = width

    def into(self, theirs: Tensor) -> Tensor:
        return theirs.unflatten(0, (-1, 2, self.granule // 2)).transpose(1, 2).flatten(0, 2)

    def back(self, ours: Tensor) -> Tensor:
        return ours.unflatten(0, (-1, self.granule // 2, 2)).transpose(1, 2).flatten(0, 2)


@final
class Transposed(Turn):
    """The last two dims change places."""

    def into(self, theirs: Tensor) -> Tensor:
        return theirs.transpose(-1, -2)

    def back(self, ours: Tensor) -> Tensor:
        return ours.transpose(-1, -2)


@final
class EvenOdd(Turn):
    """Even rows of theirs, then odd ones (gpt-oss interleaves gate and up), along the first dim."""

    def into(self, theirs: Tensor) -> Tensor:
        return torch.cat([theirs[0::2], theirs[1::2]])

    def back(self, ours: Tensor) -> Tensor:
        return ours.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


@final
class Shaped(Turn):
    """The same numbers in the same order, in another shape."""

    def __init__(self, theirs: tuple[int, ...], ours: tuple[int, ...]) -> None:
        self.theirs, self.ours = theirs, ours

    def into(self, theirs: Tensor) -> Tensor:
        return theirs.reshape(self.ours)

    def back(self, ours: Tensor) -> Tensor:
        return ours.reshape(self.theirs)


@final
class Scaled(Turn):
    """Theirs is ours times a factor; for what a family can hold only multiplied out."""

    granule = 1

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def into(self, theirs: Tensor) -> Tensor:
        return theirs / self.factor

    def back(self, ours: Tensor) -> Tensor:
        return ours * self.factor


@final
class Chain(Turn):
    """Several turns, in the order from theirs to ours."""

    def __init__(self, *turns: Turn) -> None:
        self.turns = turns

    def into(self, theirs: Tensor) -> Tensor:
        for turn in self.turns:
            theirs = turn.into(theirs)
        return theirs

    def back(self, ours: Tensor) -> Tensor:
        for turn in reversed(self.turns):
            ours = turn.back(ours)
        return ours


@final
@dataclass(frozen=True)
class Piece:
    """`ours[at] = turn.into(theirs[part])`; `shape` is the whole shape of their tensor.

    `at` indexes any leading dims; `part` only the first (an expert, a range of rows).
    """

    theirs: str
    shape: tuple[int, ...]
    at: Index = ()
    part: int | slice | None = None
    turn: Turn = SAME

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of `theirs[part]`."""
        if isinstance(self.part, int):
            return self.shape[1:]
        if self.part is None:
            return self.shape
        return (len(range(self.shape[0])[self.part]), *self.shape[1:])


@final
@dataclass(frozen=True)
class Entry:
    """One tensor of ours. Where pieces do not cover it, an import fills it with `fill`.

    An entry without pieces is left out at export: `why` then says why nothing is lost by it.
    """

    ours: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    fill: float | None = None
    why: str = ""

    @property
    def covered(self) -> int:
        """How many of its numbers come from pieces."""
        return sum(math.prod(piece.part_shape) for piece in self.pieces)


@final
@dataclass(frozen=True)
class Layout:
    """One way of naming and cutting a family's tensors.

    `dropped` pairs a pattern of their names (fullmatch) with the reason why an import leaves such
    tensors out; they are counted and shown. It also covers what pieces leave of a tensor (rows of
    zero experts). `filled` are whole tensors that an export adds as zeros. Parts of theirs that no
    piece covers are written as zeros. `exact` are patterns of their names that keep the stored
    dtype whatever `--dtype` says (router biases in fp32).
    """

    entries: tuple[Entry, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    filled: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = ()
    exact: tuple[str, ...] = ()
