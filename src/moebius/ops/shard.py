"""Which part of a weight a rank holds, and how the whole is put together from all of them.

A shard cuts rows, or some columns of rows; ranks may hold different numbers of rows, and none at
all, as those of another stage of a pipeline do. Whatever has an element for each of its weight (a
gradient, a moment) is cut the same way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.ops.ranks import rank_in

Range = tuple[int, int]


class Rows(Protocol):
    """What rows can be taken of by a slice: a tensor, or one that lies in a file."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class Fragment:
    """A rectangle of a whole of this shape: where its first row and its first column lie there."""

    tensor: Tensor
    shape: tuple[int, ...]
    row: int = 0
    column: int = 0


@dataclass(frozen=True)
class Span:
    """What lies on a rank: ranges of rows, one after the other; of these some columns, or all."""

    rows: tuple[Range, ...]
    columns: Range | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the part."""
        return sum(stop - start for start, stop in self.rows)

    def within(self, first: int, last: int) -> "Span":
        """The span of rows `first` to `last` of this span's own."""
        kept: list[Range] = []
        for start, stop in self.rows:
            low, high = max(start, start + first), min(stop, start + last)
            if low < high:
                kept.append((low, high))
            first, last = first - (stop - start), last - (stop - start)
        return Span(tuple(kept), self.columns)

    def of(self, whole: Rows) -> Tensor:
        """The part, as a copy; no other rows are taken."""
        rows = [whole[start:stop] for start, stop in ((0, 0), *self.rows)]
        if self.columns is not None:
            rows = [some[:, slice(*self.columns)] for some in rows]
        return torch.cat(rows)

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Write the part to its place in the whole."""
        whole = whole if self.columns is None else whole[:, slice(*self.columns)]
        sizes = [stop - start for start, stop in self.rows]
        for (start, stop), rows in zip(self.rows, part.split(sizes), strict=True):
            whole[start:stop] = rows


@dataclass(frozen=True)
class Shard:
    """The whole's shape, the span of each rank of a group, and which of them this one is.

    With a `line` of stages, only the group of its `home` there holds the weight.
    """

    shape: tuple[int, ...]
    spans: tuple[Span, ...]
    rank: int
    group: dist.ProcessGroup
    line: dist.ProcessGroup | None = None
    home: int = 0

    @property
    def here(self) -> bool:
        """Whether this rank's group holds the weight."""
        return rank_in(self.line) == self.home

    @property
    def cuts_matrices(self) -> bool:
        """Whether parts of one matrix lie apart; a stack of them [E, R, C] is cut between them."""
        return len(self.shape) < 3

    def part(self, whole: Rows) -> Tensor:
        """This rank's part of the whole, as a copy."""
        span = self.spans[self.rank]
        return (span if self.here else Span(())).of(whole)

    def fragments(self, part: Tensor) -> Iterator[Fragment]:
        """This rank's part in rectangles; those of all ranks of the line are the whole, once."""
        span = self.spans[self.rank]
        shape, first = self.shape_of(part), (span.columns or (0, 0))[0]
        # Ranks with other columns hold the same of what has all columns.
        if not self.here or (shape != self.shape and first):
            return
        column = first if shape == self.shape else 0
        sizes = [stop - start for start, stop in span.rows]
        for (start, _), rows in zip(span.rows, part.split(sizes), strict=True):
            yield Fragment(rows, shape, start, column)

    def shape_of(self, part: Tensor) -> tuple[int, ...]:
        """The shape of the whole of which this rank's part is given, or which has all columns."""
        start, stop = self.spans[self.rank].columns or (0, 0)
        cut = stop > start and part.shape[1:] == (stop - start,)
        return self.shape if cut else (self.shape[0], *part.shape[1:])

    def whole(self, part: Tensor) -> Tensor:
        """The whole, on every rank, of what each gives its part of."""
        if not self.here:
            return self.told(part.new_empty(self.shape_of(part)))
        return self.told(self.gathered(part))

    def told(self, whole: Tensor) -> Tensor:
        """What the ranks of its home have, on those of the other stages too, written in place."""
        if self.line is not None:
            dist.broadcast(whole, group=self.line, group_src=self.home)
        return whole

    def gathered(self, part: Tensor) -> Tensor:
        """The whole, on every rank of the group that holds it."""
        most = max(span.num_rows for span in self.spans)
        mine = part.new_zeros(most, *part.shape[1:])
        mine[: len(part)] = part.detach()
        pieces = [torch.empty_like(mine) for _ in self.spans]
        dist.all_gather(pieces, mine, group=self.group)
        whole = part.new_empty(self.shape_of(part))
        for piece, span in zip(pieces, self.spans, strict=True):
            span.put(piece[: span.num_rows], whole)
        return whole
