"""The values that an element of a low-precision format can take, and rounding to them.

e4m3 and e5m2 are those of Micikevicius et al. 2022 (e4m3 without infinities), e2m1 that of the OCP
Microscaling Formats 1.0. Rounding works on fp32 or fp64 by exact arithmetic, so that it is the same
to the last bit on every device.
"""

import dataclasses
from typing import final

import torch
from torch import Tensor

# By dtype: an integer of its size, the mask of its exponent, the bits of its mantissa.
_LAYOUT = {
    torch.float32: (torch.int32, 0x7F800000, 23),
    torch.float64: (torch.int64, 0x7FF0000000000000, 52),
}


@final
@dataclasses.dataclass(frozen=True)
class Grid:
    """A sign, an exponent and `mantissa` bits; below 2^least_exponent values are evenly spaced."""

    name: str
    bits: int
    mantissa: int
    least_exponent: int
    maximum: float
    # The codes of infinity and of NaN, where there are any (without the sign).
    infinity: int | None = None
    nan: int | None = None

    def values(self) -> Tensor:
        """Every finite value of positive sign, rising: the value of code i stands at place i."""
        codes = torch.arange(1 << (self.bits - 1))
        field, fraction = codes >> self.mantissa, codes & ((1 << self.mantissa) - 1)
        whole = fraction + ((field > 0).int() << self.mantissa)
        power = field.clamp(min=1) - 1 + self.least_exponent - self.mantissa
        values = (whole.double() * torch.exp2(power.double())).float()
        return values[values <= self.maximum]

    def decode(self, codes: Tensor) -> Tensor:
        """The fp32 values of codes (uint8), sign in the highest of the format's bits."""
        table = torch.full((1 << (self.bits - 1),), torch.nan)
        values = self.values()
        table[: len(values)] = values
        if self.infinity is not None:
            table[self.infinity] = torch.inf
        # A NaN may stand where e4m3's largest exponent would go on.
        if self.nan is not None:
            table[self.nan] = torch.nan
        both = torch.cat([table, -table]).to(codes.device)
        return both[codes.long()]

    def encode(self, values: Tensor) -> Tensor:
        """The codes (uint8) of values that lie on the grid; of NaN, 0 where the grid has none."""
        table = self.values().to(values.device)
        code = torch.searchsorted(table, values.abs().nan_to_num(0.0).float().contiguous())
        code = torch.where(values.isnan(), self.nan or 0, code)
        sign = values.signbit() & ~values.isnan()
        return (code + (sign.int() << (self.bits - 1))).to(torch.uint8)

    def nearest(self, x: Tensor) -> Tensor:
        """x (fp32 or fp64) rounded to the nearest value, ties to even; what is larger saturates.

        NaN stays NaN; infinities saturate. Signs of zeros are kept.
        """
        return self.nearest_of(x.clone())

    def nearest_of(self, x: Tensor) -> Tensor:
        """The same of an x that nobody needs any more: it may be overwritten."""
        x.clamp_(-self.maximum, self.maximum)
        # Adding 1.5 * 2^mantissa spacings leaves a multiple of the spacing, rounded to even.
        magic = self._power(x).mul_(1.5 * 2.0 ** (_LAYOUT[x.dtype][2] - self.mantissa))
        return (x + magic).sub_(magic).copysign_(x)

    def stochastic(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x rounded up or down to a neighbour, each the likelier the nearer: x on average.

        Draws from `generator`, or from the device's own; values on the grid stay as they are.
        """
        x = x.clamp(-self.maximum, self.maximum)
        spacing = self._power(x).mul_(2.0**-self.mantissa)
        scaled = x / spacing
        below = scaled.floor()
        # Drawn in fp32 on any path: [0, 1) in steps of 2^-24.
        chance = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        up = (scaled - below) > chance
        return below.add_(up).mul_(spacing).copysign_(x)

    def _power(self, x: Tensor) -> Tensor:
        """2^floor(log2 |x|), at least 2^least_exponent."""
        whole, mask, _ = _LAYOUT[x.dtype]
        return (x.view(whole) & mask).view(x.dtype).clamp_(min=2.0**self.least_exponent)


E4M3 = Grid("e4m3", bits=8, mantissa=3, least_exponent=-6, maximum=448.0, nan=0x7F)
E5M2 = Grid("e5m2", 8, mantissa=2, least_exponent=-14, maximum=57344.0, infinity=0x7C, nan=0x7E)
E2M1 = Grid("e2m1", bits=4, mantissa=1, least_exponent=0, maximum=6.0)
GRIDS = {grid.name: grid for grid in (E4M3, E5M2, E2M1)}
