"""Which rows of a weight a rank holds, and how the whole is put together from all of them.

A shard cuts the first dim; ranks may hold different numbers of rows, and none at all. Whatever has
a row for each row of its weight (a gradient, a moment) is cut the same way.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The whole's shape, the rows of each rank of a group, and which of them this one is."""

    shape: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    rank: int
    group: dist.ProcessGroup

    @property
    def cuts_matrices(self) -> bool:
        """Whether rows of one matrix lie apart; a stack of them [E, R, C] is cut between them."""
        return len(self.shape) < 3

    def part(self, whole: Tensor) -> Tensor:
        """This rank's rows of the whole, as a copy."""
        start, stop = self.spans[self.rank]
        return whole[start:stop].clone()

    def whole(self, part: Tensor) -> Tensor:
        """The whole, on every rank, of what each gives its rows of."""
        most = max(stop - start for start, stop in self.spans)
        mine = part.new_zeros(most, *part.shape[1:])
        mine[: len(part)] = part.detach()
        pieces = [torch.empty_like(mine) for _ in self.spans]
        dist.all_gather(pieces, mine, group=self.group)
        whole = part.new_empty(self.shape[0], *part.shape[1:])
        for piece, (start, stop) in zip(pieces, self.spans, strict=True):
            whole[start:stop] = piece[: stop - start]
        return whole
