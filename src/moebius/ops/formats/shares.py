"""What rounding did to a tensor: the shares of its non-zero values that were lost or cut.

`underflow`: rounded to zero; `saturated`: beyond the largest number their scale can hold;
`outliers`: beyond six times the root mean square. Computed only for somebody who watches, and on a
regular sample of the rows of large tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moebius.ops.formats.grid import Grid
from moebius.ops.formats.plain import blocked
from moebius.ops.formats.quantise import Quantised

# About so many values are looked at.
SAMPLE = 1 << 17
# Shown the name and the share of a quantised tensor: `underflow/x`, `outliers/dy`.
Watch = Callable[[str, Tensor], None]


@torch.no_grad()
def show(watch: Watch | None, what: str, x: Tensor, q: Quantised, grid: Grid) -> None:
    """Show the shares of x, that became q along its last dim."""
    if watch is None:
        return
    every = max(1, x.numel() // SAMPLE)
    x = blocked(x, -1, q.blocks.shape[-1]).flatten(0, -3)[::every]
    values, limit = q.blocks.flatten(0, -3)[::every], (q.total() * grid.maximum)
    limit = limit.expand(*q.blocks.shape[:-1], 1).flatten(0, -3)[::every]
    there = x != 0
    count = there.sum().clamp(min=1)
    size = x.abs()
    lost = {
        "underflow": there & (values == 0),
        "saturated": size > limit,
        "outliers": size > 6 * ((x * x).sum() / count).sqrt(),
    }
    for name, found in lost.items():
        watch(f"{name}/{what}", found.sum() / count)
