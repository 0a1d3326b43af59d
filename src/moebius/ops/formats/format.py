"""The seam of number formats: an element's grid, and the scale that blocks of elements share.

A format is a frozen dataclass in a file of its own. `quantise` rounds a tensor along the dim that a
product contracts; a ragged last block is filled with zeros. A block that holds NaN or an infinity
becomes NaN as a whole, so that nothing broken passes for a number.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.config import Variant
from moebius.ops.formats.grid import Grid


@dataclasses.dataclass(frozen=True)
class Format(Variant, ABC):
    """How numbers of a product are held."""

    TABLE: ClassVar[Mapping[str, str]] = {
        "fp8": "moebius.ops.formats.fp8:FP8",
        "mxfp8": "moebius.ops.formats.mx:MXFP8",
        "mxfp4": "moebius.ops.formats.mx:MXFP4",
        "nvfp4": "moebius.ops.formats.nvfp4:NVFP4",
    }
    SEAM: ClassVar[str] = "number format"
    # Elements that share a scale, along the contracted dim; None: all of a row.
    BLOCK: ClassVar[int | None] = None

    @abstractmethod
    def grid(self, gradient: bool) -> Grid:
        """The values of elements: of a gradient, or of activations and weights."""

    @abstractmethod
    def scales(self, amax: Tensor, matrix_amax: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """From fp32 maxima of blocks and of whole matrices: the blocks' scales, the matrices'.

        Fp32 tensors of the shapes of their maxima; None where a matrix has no scale of its own.
        """

    @property
    def native(self) -> bool:
        """Whether a CUDA device of compute capability 9 multiplies it."""
        return False


@final
@dataclasses.dataclass(frozen=True)
class Quantised:
    """Elements on their grid and the scales: `blocks * scale * outer`, in fp32 (or fp64).

    `dim` (-1 or -2) is the contracted one, of `length`; in `blocks` it is two, blocks and elements.
    """

    blocks: Tensor
    scale: Tensor
    outer: Tensor | None
    dim: int
    length: int
    # Whether a row has one scale; it then stays outside of a product, as `outer` does.
    by_row: bool

    def values(self) -> Tensor:
        """The elements on their grid, in the shape of the tensor that was quantised."""
        return self._flat(self.blocks).narrow(self.dim, 0, self.length)

    def total(self) -> Tensor:
        """What an element is multiplied by, broadcastable to `blocks`."""
        return self.scale if self.outer is None else self.scale * self.outer

    def dequantise(self) -> Tensor:
        """What the numbers stand for, in the shape of the tensor that was quantised."""
        values = self.blocks * self.scale
        values = values if self.outer is None else values * self.outer
        return self._flat(values).narrow(self.dim, 0, self.length)

    def rows(self, dtype: torch.dtype) -> Tensor:
        """[..., R, C]: what a product multiplies, contracted (padded) dim last; exact in bf16."""
        values = self.blocks if self.by_row else self.blocks * self.scale
        flat = self._flat(values).to(dtype)
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
    gradient: bool = False,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
    matrix_amax: Tensor | None = None,
) -> Quantised:
    """Round matrices x[..., R, C] to a format, scales taken along `dim`, -1 or -2.

    Computed in at least fp32. A stochastic rounding draws from `generator`, or from torch's own of
    the device, which checkpoints carry. A scale of a matrix is of the last two dims, unless the
    maxima it comes from are given, of as many dims as x and one more.
    """
    if dim not in (-1, -2) or x.ndim < -dim:
        raise ValueError(f"dim must be -1 or -2 of a matrix, not {dim} of {x.ndim} dims")
    blocks = blocked(x.detach().to(torch.promote_types(x.dtype, torch.float32)), dim, format.BLOCK)
    amax = largest(blocks, dim)
    if matrix_amax is None:
        matrix_amax = _amax_of_matrices(amax)
    grid = format.grid(gradient)
    scale, outer = format.scales(amax.float(), matrix_amax.float(), grid)
    scale = torch.where(amax.isfinite(), scale, torch.nan).to(blocks.dtype)
    outer = None if outer is None else outer.to(blocks.dtype)
    total = scale if outer is None else scale * outer
    # A scale that is 0 makes zeros of its block.
    scaled = blocks / torch.where(total == 0, torch.inf, total)
    values = grid.stochastic(scaled, generator) if stochastic else grid.nearest_of(scaled)
    return Quantised(values, scale, outer, dim, x.shape[dim], format.BLOCK is None)


def _amax_of_matrices(amax: Tensor) -> Tensor:
    """From the maxima of blocks; 0 where there are no rows."""
    dims = tuple(range(-min(3, amax.ndim), 0))
    return amax.amax(dims, keepdim=True) if amax.numel() else amax.sum(dims, keepdim=True)


def blocked(x: Tensor, dim: int, block: int | None) -> Tensor:
    """x with `dim` (-1 or -2) cut into blocks, filled up with zeros: [..., blocks, elements]."""
    length = x.shape[dim]
    size = max(1, length) if block is None else block
    missing = -length % size if length else size
    if missing:
        x = F.pad(x, (0, missing) if dim == -1 else (0, 0, 0, missing))
    return x.unflatten(dim, (-1, size))


def largest(blocks: Tensor, dim: int) -> Tensor:
    """The largest magnitude of each block, NaN where there is one; `dim` becomes 1."""
    size = blocks.abs()
    if dim == -1 and blocks.shape[-1] == 16 and blocks.numel():
        # A CPU reduces dims shorter than 32 by one number at a time; pools it does not.
        return F.max_pool1d(size.reshape(-1, 1, 16), 16).view(*size.shape[:-1], 1)
    return size.amax(dim, keepdim=True)


def divided(x: Tensor, number: float) -> Tensor:
    """x / number, truly divided: by a plain number, CUDA multiplies with its reciprocal."""
    return x / x.new_full((), number)


# Scales never vanish by underflow: they stop at the least normal fp32 number.
TINY = torch.finfo(torch.float32).tiny
