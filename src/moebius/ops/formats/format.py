"""The seam of number formats: an element's grid, and the scale that blocks of elements share.

A format is a frozen dataclass in a file of its own; `quantise.py` rounds tensors to it.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
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


def divided(x: Tensor, number: float) -> Tensor:
    """x / number, truly divided: by a plain number, CUDA multiplies with its reciprocal."""
    return x / x.new_full((), number)


# Scales never vanish by underflow: they stop at the least normal fp32 number.
TINY = torch.finfo(torch.float32).tiny
