"""What rounding did to a tensor: the shares of its non-zero values that were lost or cut.

`underflow`: rounded to zero; `saturated`: beyond the largest number their scale can hold;
`outliers`: beyond six times the root mean square. Computed only for somebody who watches.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moebius.ops.formats.format import Quantised, blocked
from moebius.ops.formats.grid import Grid

# Shown the name and the share of a quantised tensor: `underflow/x`, `outliers/dy`.
Watch = Callable[[str, Tensor], None]


@torch.no_grad()
def show(watch: Watch | None, what: str, x: Tensor, q: Quantised, grid: Grid) -> None:
    """Show the shares of x, that became q."""
    if watch is None:
        return
    x = blocked(x.to(q.blocks.dtype), q.dim, None if q.by_row else q.blocks.shape[q.dim])
    there = x != 0
    count = there.sum().clamp(min=1)
    size = x.abs()
    lost = {
        "underflow": there & (q.blocks == 0),
        "saturated": size > q.total() * grid.maximum,
        "outliers": size > 6 * ((x * x).sum() / count).sqrt(),
    }
    for name, found in lost.items():
        watch(f"{name}/{what}", found.sum() / count)
