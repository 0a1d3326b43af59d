"""NVFP4: e2m1 elements, an e4m3 scale every 16 of them, and an fp32 scale of the whole matrix.

The matrix's scale (largest magnitude / (448 * 6)) brings the scales of blocks into e4m3's range; a
block whose scale still rounds to 0 becomes zeros. The layout of NVIDIA's Blackwell.
"""

import dataclasses
from typing import ClassVar

from torch import Tensor

from moebius.ops.formats.format import TINY, Format, divided
from moebius.ops.formats.grid import E2M1, E4M3, Grid


@dataclasses.dataclass(frozen=True)
class NVFP4(Format):
    """Two levels of scales over blocks of 16."""

    BLOCK: ClassVar[int | None] = 16

    def grid(self, gradient: bool) -> Grid:
        return E2M1

    def scales(self, amax: Tensor, matrix_amax: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
        outer = divided(matrix_amax, E4M3.maximum * grid.maximum).clamp(min=TINY)
        return E4M3.nearest(divided(amax, grid.maximum) / outer), outer
