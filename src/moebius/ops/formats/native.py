"""Rounding to a format on the CPU: two passes over memory, for the maxima and for the elements;
and one that applies scales to a product.

See `plain.py` for what they compute; x in bf16 or fp32.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from moebius.ops.formats.grid import Grid
from moebius.ops.formats.plain import scale_plain
from moebius.ops.native import address, integer, library, real, threads

SOURCE = Path(__file__).with_name("native.cpp")


def largest_native(x: Tensor, dim: int, block: int) -> Tensor:
    """See `moebius.ops.formats.plain.largest_plain`."""
    x = x.contiguous()
    shape = _blocks(x, dim, block)
    shape[dim] = 1
    amax = torch.empty(shape, dtype=torch.float32)
    library(SOURCE).largest_of(
        address(x), _half(x.dtype), address(amax), *_sizes(x, dim, block), threads()
    )
    return amax


def round_native(
    x: Tensor,
    dim: int,
    block: int,
    grid: Grid,
    total: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `moebius.ops.formats.plain.round_plain`."""
    # Names keep what has an address alive.
    x, total = x.contiguous(), total.contiguous()
    scale = scale if scale is None else scale.contiguous()
    y = torch.empty(_blocks(x, dim, block), dtype=dtype)
    library(SOURCE).round_to_grid(
        address(x),
        _half(x.dtype),
        address(total),
        address(scale),
        address(y),
        _half(dtype),
        *_sizes(x, dim, block),
        real(grid.maximum),
        real(2.0**grid.least_exponent),
        real(1.5 * 2.0 ** (23 - grid.mantissa)),
        threads(),
    )
    return y


def scale_native(x_RC: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """See `moebius.ops.formats.plain.scale_plain`; one of bf16 is overwritten."""
    if x_RC.dtype != torch.bfloat16:
        return scale_plain(x_RC, row, column)
    x_RC, row, column = x_RC.contiguous(), row.contiguous(), column.contiguous()
    sides = [(address(f), integer(int(f.numel() > 1))) for f in (row, column)]
    library(SOURCE).scale_product(
        address(x_RC), *sides[0], *sides[1], *map(integer, x_RC.shape), threads()
    )
    return x_RC


def _blocks(x: Tensor, dim: int, block: int) -> list[int]:
    """The shape of x in whole blocks; one of zeros where there is nothing."""
    shape = list(x.shape)
    at = x.ndim + dim
    shape[at : at + 1] = [max(1, -(-x.shape[dim] // block)), block]
    return shape


def _sizes(x: Tensor, dim: int, block: int) -> list[ctypes.c_int64]:
    matrices, rows = x.shape[:-2].numel(), x.shape[-2] if x.ndim > 1 else 1
    return [*map(integer, (matrices, rows, x.shape[-1], block, int(dim == -2)))]


def _half(dtype: torch.dtype) -> ctypes.c_int64:
    return integer(int(dtype == torch.bfloat16))
