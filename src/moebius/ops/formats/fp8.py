"""fp8 with one fp32 scale a row of the contracted dim, as torch's row-wise products have it.

e4m3 for activations and weights, and for gradients too unless e5m2 is asked for. Scale = largest
magnitude of the row / the grid's maximum (448 or 57,344).
"""

import dataclasses
from typing import Literal

from torch import Tensor

from moebius.ops.formats.format import TINY, Format, divided
from moebius.ops.formats.grid import E4M3, GRIDS, Grid


@dataclasses.dataclass(frozen=True)
class FP8(Format):
    """Row-wise fp8; `gradient` names the grid of gradients."""

    gradient: Literal["e4m3", "e5m2"] = "e4m3"

    def grid(self, gradient: bool) -> Grid:
        return GRIDS[self.gradient] if gradient else E4M3

    def scales(self, amax: Tensor, matrix_amax: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
        return divided(amax, grid.maximum).clamp(min=TINY), None

    @property
    def native(self) -> bool:
        return self.gradient == "e4m3"
