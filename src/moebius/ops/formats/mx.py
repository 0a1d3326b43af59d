"""OCP Microscaling Formats 1.0: mxfp8 and mxfp4, blocks of 32 that share a power of two (E8M0).

`floor`, the standard's rule: exponent of the block's largest magnitude less that of the grid's
maximum, so the largest may saturate. `rceil`: the least power of two with which nothing does.
"""

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moebius.ops.formats.format import Format
from moebius.ops.formats.grid import E2M1, E4M3, GRIDS, Grid

ScaleRule = Literal["floor", "rceil"]


@dataclasses.dataclass(frozen=True)
class MXFP8(Format):
    """Elements e4m3 (gradients e5m2 where asked)."""

    BLOCK: ClassVar[int | None] = 32
    scale: ScaleRule = "floor"
    gradient: Literal["e4m3", "e5m2"] = "e4m3"

    def grid(self, gradient: bool) -> Grid:
        return GRIDS[self.gradient] if gradient else E4M3

    def scales(self, amax: Tensor, matrix_amax: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
        return power_of_two(amax, grid.maximum, self.scale), None


@dataclasses.dataclass(frozen=True)
class MXFP4(Format):
    """Elements e2m1."""

    BLOCK: ClassVar[int | None] = 32
    scale: ScaleRule = "floor"

    def grid(self, gradient: bool) -> Grid:
        return E2M1

    def scales(self, amax: Tensor, matrix_amax: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
        return power_of_two(amax, grid.maximum, self.scale), None


def power_of_two(amax: Tensor, maximum: float, rule: ScaleRule) -> Tensor:
    """The E8M0 scale (2^-127 to 2^127) of blocks; 2^-127 for blocks of zeros."""
    fraction, exponent = torch.frexp(amax)
    limit, shift = math.frexp(maximum)
    exponent = exponent - shift
    if rule == "rceil":
        exponent = exponent + (fraction > limit)
    exponent = torch.where(amax > 0, exponent, -127).clamp(-127, 127).to(torch.int32)
    # Set bit by bit, which is exact everywhere; 2^-127 is fp32's subnormal of half the mantissa.
    bits = torch.where(exponent > -127, (exponent + 127) << 23, 1 << 22)
    return bits.to(torch.int32).view(torch.float32)
