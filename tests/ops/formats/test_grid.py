"""Grids: every code there and back, rounding against exact arithmetic and torch's own casts."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from moebius.ops.formats.grid import E2M1, E4M3, E5M2, GRIDS, Grid

from ..compare import noise
from .exact import on_grid

CASTS = [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)]


def spread(num: int, seed: int = 0) -> Tensor:
    """Numbers of all sizes around a grid, and the smallest and largest of fp32."""
    size = torch.exp2(noise(num, seed=seed + 1, dtype=torch.float32) * 6)
    edges = torch.tensor([0.0, 1e-45, 1e-38, 3e38, 448, 464, 465, 57344, 61440, 65536, 6, 7, 1e4])
    return torch.cat([noise(num, seed=seed, dtype=torch.float32) * size, edges, -edges])


def ties(grid: Grid) -> Tensor:
    """The middles between neighbours, and the numbers next to them."""
    values = grid.values()
    middle = (values[1:] + values[:-1]) / 2
    lower = torch.nextafter(middle, torch.tensor(0.0))
    return torch.cat([middle, lower, torch.nextafter(middle, torch.tensor(torch.inf))])


@pytest.mark.parametrize("grid", GRIDS.values(), ids=str)
def test_every_value_comes_back(grid: Grid) -> None:
    codes = torch.arange(1 << grid.bits, dtype=torch.uint8)
    values = grid.decode(codes)
    finite = values.isfinite()
    assert finite.sum() == {"e4m3": 254, "e5m2": 248, "e2m1": 16}[grid.name]
    assert torch.equal(grid.encode(values[finite]), codes[finite])
    for same in (grid.nearest(values[finite]), grid.stochastic(values[finite])):
        assert torch.equal(same, values[finite])
        assert torch.equal(same.signbit(), values[finite].signbit())


def test_the_values_of_four_bits() -> None:
    assert E2M1.values().tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize(("grid", "dtype"), CASTS, ids=str)
def test_codes_are_those_of_torch(grid: Grid, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(dtype).float()
    torch.testing.assert_close(grid.decode(codes), theirs, rtol=0, atol=0, equal_nan=True)
    x = torch.cat([spread(20_000), ties(grid), -ties(grid)])
    # What saturates is compared at the largest value: torch makes e5m2's infinite.
    cast = x.clamp(-grid.maximum, grid.maximum).to(dtype)
    assert torch.equal(grid.nearest(x), cast.float())
    assert torch.equal(grid.encode(grid.nearest(x)), cast.view(torch.uint8))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_exact(grid: Grid, dtype: torch.dtype) -> None:
    x = torch.cat([spread(1500, seed=2), ties(grid), -ties(grid)])
    want = [float(on_grid(Fraction(value), grid.name)) for value in x.tolist()]
    assert grid.nearest(x.to(dtype)).tolist() == want


@pytest.mark.parametrize("grid", GRIDS.values(), ids=str)
def test_what_is_no_number(grid: Grid) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    for rounded in (grid.nearest(x), grid.stochastic(x)):
        assert rounded[0].isnan()
        assert rounded[1:].tolist() == [grid.maximum, -grid.maximum, 0.0]
        assert rounded[3].signbit()
    assert grid.encode(x)[0] == (grid.nan or 0)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chance_takes_a_neighbour_and_is_right_on_average(grid: Grid, dtype: torch.dtype) -> None:
    values = grid.values().to(dtype)
    for low, high in ((0, 1), (1, 2), (4, 5), (len(values) - 2, len(values) - 1)):
        for sign in (1, -1):
            below, above = values[low], values[high]
            x = sign * (below + (above - below) * 0.3)
            draws = grid.stochastic(x.expand(20_000), torch.Generator().manual_seed(1)).abs()
            up = draws == above
            assert (up | (draws == below)).all()
            # Five standard deviations of a share of 20,000.
            assert abs(float(up.double().mean()) - 0.3) < 5 * (0.3 * 0.7 / 20_000) ** 0.5


def test_chance_is_a_function_of_its_generator() -> None:
    x = noise(1000, dtype=torch.float32)
    first, same, other = (
        E2M1.stochastic(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    torch.manual_seed(0)
    assert torch.equal(E2M1.stochastic(x), first)
