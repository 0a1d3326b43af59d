"""Rounding a tensor to a number format, along the dim that a product contracts.

A ragged last block is filled with zeros. A block that holds NaN or an infinity becomes NaN as a
whole, so that nothing broken passes for a number. `plain` is torch's own operations, on any device;
`native` the CPU kernel, the same to the last bit.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, final

import torch
from torch import Tensor

from moebius.ops.formats.format import Format
from moebius.ops.formats.grid import Grid
from moebius.ops.formats.native import largest_native, round_native, scale_native
from moebius.ops.formats.plain import blocked, largest_plain, round_plain, rounded, scale_plain
from moebius.ops.native import missing


class Rounding(NamedTuple):
    """The passes over memory that rounding and a product of what was rounded need."""

    # Of x, dim and the length of a block: the largest magnitude of each block.
    largest: Callable[[Tensor, int, int], Tensor]
    # Of these, the grid, what blocks are divided by, their scale (or None), and a dtype: elements.
    nearest: Callable[[Tensor, int, int, Grid, Tensor, Tensor | None, torch.dtype], Tensor]
    # Of a product [R, C], what its rows and its columns are multiplied by: that, in its dtype.
    scaled: Callable[[Tensor, Tensor, Tensor], Tensor]


BACKENDS: dict[str, Rounding] = {
    "plain": Rounding(largest_plain, round_plain, scale_plain),
    "native": Rounding(largest_native, round_native, scale_native),
}


@final
@dataclasses.dataclass(frozen=True)
class Quantised:
    """Elements on their grid and their scales.

    `blocks` holds the elements times the scale of their block; a row's one scale stays outside of a
    product (`by_row`), as `outer` does, that of a matrix. `dim` (-1 or -2) is the contracted one,
    of `length`; in `blocks` it is two, blocks and elements. Scales are in fp32 (or fp64).
    """

    blocks: Tensor
    scale: Tensor
    outer: Tensor | None
    dim: int
    length: int
    by_row: bool

    def values(self) -> Tensor:
        """The elements on their grid, in the shape of the tensor that was quantised."""
        values = self.blocks
        if not self.by_row:
            values = values / torch.where(self.scale == 0, 1.0, self.scale)
        return self._flat(values).narrow(self.dim, 0, self.length)

    def total(self) -> Tensor:
        """What an element is multiplied by, broadcastable to `blocks`."""
        return self.scale if self.outer is None else self.scale * self.outer

    def dequantise(self) -> Tensor:
        """What the numbers stand for, in the shape of the tensor that was quantised."""
        factor = self.scale if self.by_row else self.outer
        values = self.blocks if factor is None else self.blocks * factor
        return self._flat(values).narrow(self.dim, 0, self.length)

    def rows(self) -> Tensor:
        """[..., R, C]: what a product multiplies, contracted (padded) dim last."""
        flat = self._flat(self.blocks)
        return flat if self.dim == -1 else flat.mT

    def factor(self) -> Tensor | None:
        """[..., R or 1, 1]: what a product's rows are multiplied by afterwards."""
        factor = self.scale if self.by_row else self.outer
        if factor is None:
            return None
        flat = self._flat(factor)
        return flat if self.dim == -1 else flat.mT

    def _flat(self, blocks: Tensor) -> Tensor:
        return blocks.flatten(self.dim - 1, self.dim)


def quantise(
    x: Tensor,
    format: Format,
    dim: int = -1,
    *,
    dtype: torch.dtype | None = None,
    gradient: bool = False,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
    segments: Sequence[int] | None = None,
) -> Quantised:
    """Round matrices x[..., R, C] to a format, scales taken along `dim`, -1 or -2.

    Computed in at least fp32; elements times scales are handed out in `dtype`, that by default, and
    are exact in bf16. A stochastic rounding draws from `generator`, or from torch's own of the
    device, which checkpoints carry. `segments` of a single x[R, C] are matrices of their own, one
    below the other: of so many rows each, or of so many blocks of rows where `dim` is -2.
    """
    if dim not in (-1, -2) or x.ndim < -dim:
        raise ValueError(f"dim must be -1 or -2 of a matrix, not {dim} of {x.ndim} dims")
    x, whole = x.detach(), torch.promote_types(x.dtype, torch.float32)
    dtype, grid = whole if dtype is None else dtype, format.grid(gradient)
    block = max(1, x.shape[dim]) if format.BLOCK is None else format.BLOCK
    rounding = BACKENDS[choose(x, dtype)]
    amax = rounding.largest(x, dim, block)
    scale, outer = format.scales(amax.float(), _of_matrices(amax, segments).float(), grid)
    scale = torch.where(amax.isfinite(), scale, torch.nan).to(whole)
    outer = None if outer is None else outer.to(whole)
    total, by_row = scale if outer is None else scale * outer, format.BLOCK is None
    inner = None if by_row else scale
    if stochastic:
        chance = partial(grid.stochastic, generator=generator)
        held = rounded(blocked(x, dim, block), chance, total, inner).to(dtype)
    else:
        held = rounding.nearest(x, dim, block, grid, total, inner, dtype)
    return Quantised(held, scale, outer, dim, x.shape[dim], by_row)


def choose(x: Tensor, dtype: torch.dtype) -> str:
    """The backend that rounds x for products in `dtype`, by name."""
    fits = x.device.type == "cpu" and {x.dtype, dtype} <= {torch.float32, torch.bfloat16}
    return "native" if fits and missing() is None else "plain"


def _of_matrices(amax: Tensor, segments: Sequence[int] | None) -> Tensor:
    """The maxima of whole matrices from those of their blocks; 0 where there are no rows."""
    if segments is None:
        dims = tuple(range(-min(3, amax.ndim), 0))
        return amax.amax(dims, keepdim=True) if amax.numel() else amax.sum(dims, keepdim=True)
    parts = [part.amax() if len(part) else part.sum() for part in amax.split(list(segments))]
    times = torch.tensor(segments, device=amax.device)
    return torch.stack(parts).repeat_interleave(times)[:, None, None]
