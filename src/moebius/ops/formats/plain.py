"""Rounding to a format by torch's own operations, on any device.

x[..., R, C] is cut into blocks along `dim` (-1 or -2), which becomes two: blocks and elements.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.ops.formats.grid import Grid


def blocked(x: Tensor, dim: int, block: int) -> Tensor:
    """x, in at least fp32, cut into blocks, the last one filled up with zeros."""
    missing = -x.shape[dim] % block if x.shape[dim] else block
    if missing:
        x = F.pad(x, (0, missing) if dim == -1 else (0, 0, 0, missing))
    return x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(dim, (-1, block))


def largest_plain(x: Tensor, dim: int, block: int) -> Tensor:
    """The largest magnitude of each block, NaN where there is one; its elements become one."""
    return blocked(x, dim, block).abs().amax(dim, keepdim=True)


def round_plain(
    x: Tensor,
    dim: int,
    block: int,
    grid: Grid,
    total: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Blocks of x / total rounded to the nearest element of the grid, times the scale if any."""
    return rounded(blocked(x, dim, block), grid.nearest_of, total, scale).to(dtype)


def rounded(
    blocks: Tensor, element: Callable[[Tensor], Tensor], total: Tensor, scale: Tensor | None
) -> Tensor:
    """The element of each of blocks / total, which may be overwritten, times the scale if any."""
    # A scale that is 0 makes zeros of its block.
    values = element(blocks / torch.where(total == 0, torch.inf, total))
    return values if scale is None else values * scale


def scale_plain(x_RC: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """x_RC times row [R or 1, 1] and column [1, C or 1], in at least fp32, in the dtype of x."""
    return (x_RC.to(row.dtype) * row * column).to(x_RC.dtype)
