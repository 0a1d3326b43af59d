"""The formats in exact rational numbers of Python: no torch, no floating point.

`rounded` is IEEE's rounding to nearest, ties to even, for any mantissa and least exponent, so the
same few lines are fp32's division and the low-precision grids.
"""

from fractions import Fraction

from moebius.ops.formats import Format
from moebius.ops.formats.fp8 import FP8
from moebius.ops.formats.mx import MXFP4, MXFP8
from moebius.ops.formats.nvfp4 import NVFP4

# Bits of mantissa, least exponent, largest value.
GRIDS = {"e4m3": (3, -6, 448), "e5m2": (2, -14, 57344), "e2m1": (1, 0, 6)}


def log2(value: Fraction) -> int:
    """The integer part of the logarithm of a positive number."""
    power = value.numerator.bit_length() - value.denominator.bit_length()
    return power if value >= Fraction(2) ** power else power - 1


def rounded(value: Fraction, mantissa: int, least_exponent: int) -> Fraction:
    """The nearest number of so many bits; of two, that whose last bit is 0."""
    if not value:
        return value
    unit = Fraction(2) ** (max(log2(abs(value)), least_exponent) - mantissa)
    count, rest = divmod(
        abs(value).numerator * unit.denominator, abs(value).denominator * unit.numerator
    )
    twice, whole = 2 * rest, abs(value).denominator * unit.numerator
    count += twice > whole or (twice == whole and count % 2 == 1)
    return count * unit if value > 0 else -count * unit


def on_grid(value: Fraction, grid: str) -> Fraction:
    """Rounded and saturated."""
    mantissa, least, largest = GRIDS[grid]
    return min(max(rounded(value, mantissa, least), Fraction(-largest)), Fraction(largest))


def fp32(value: Fraction) -> Fraction:
    return rounded(value, 23, -126)


def grid_of(format: Format, gradient: bool) -> str:
    if isinstance(format, FP8 | MXFP8):
        return format.gradient if gradient else "e4m3"
    return "e2m1"


def scales(
    format: Format, amax: Fraction, matrix_amax: Fraction, gradient: bool
) -> tuple[Fraction, Fraction]:
    """The scale of a block and that of its matrix."""
    largest = Fraction(GRIDS[grid_of(format, gradient)][2])
    if isinstance(format, FP8):
        return max(fp32(amax / largest), Fraction(2) ** -126), Fraction(1)
    if isinstance(format, MXFP8 | MXFP4):
        if not amax:
            return Fraction(2) ** -127, Fraction(1)
        power = log2(amax) - log2(largest)
        if format.scale == "rceil":
            power = log2(amax / largest)
            power += Fraction(2) ** power < amax / largest
        return Fraction(2) ** max(-127, min(127, power)), Fraction(1)
    assert isinstance(format, NVFP4)
    outer = max(fp32(matrix_amax / 2688), Fraction(2) ** -126)
    return on_grid(fp32(fp32(amax / 6) / outer), "e4m3"), outer


def quantised(format: Format, rows: list[list[float]], gradient: bool) -> list[list[Fraction]]:
    """What rows stand for once quantised, each along itself."""
    exact = [[Fraction(x) for x in row] for row in rows]
    matrix_amax = max(abs(x) for row in exact for x in row)
    return [_row(format, row, matrix_amax, gradient) for row in exact]


def _row(
    format: Format, row: list[Fraction], matrix_amax: Fraction, gradient: bool
) -> list[Fraction]:
    out: list[Fraction] = []
    size = format.BLOCK or len(row)
    for start in range(0, len(row), size):
        block = row[start : start + size]
        scale, outer = scales(format, max(map(abs, block)), matrix_amax, gradient)
        total = fp32(scale * outer)
        values = [
            on_grid(fp32(x / total), grid_of(format, gradient)) if total else 0 for x in block
        ]
        out += [fp32(fp32(value * scale) * outer) for value in values]
    return out
