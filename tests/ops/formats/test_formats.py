"""Formats: scales and elements against exact arithmetic, blocks, and what is no number."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.config import from_json, to_json
from moebius.ops.formats import Format, quantise
from moebius.ops.formats.fp8 import FP8
from moebius.ops.formats.grid import E4M3
from moebius.ops.formats.mx import MXFP4, MXFP8
from moebius.ops.formats.naive import quantise_naive
from moebius.ops.formats.nvfp4 import NVFP4
from moebius.ops.formats.plain import blocked
from moebius.ops.formats.quantise import BACKENDS, choose
from moebius.ops.native import missing

from ..compare import noise
from .exact import quantised

FORMATS: list[Format] = [
    FP8(),
    FP8("e5m2"),
    MXFP8(),
    MXFP8("rceil"),
    MXFP8("floor", "e5m2"),
    MXFP4(),
    MXFP4("rceil"),
    NVFP4(),
]
everyone = pytest.mark.parametrize("format", FORMATS, ids=str)


def wide(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Rows whose numbers differ a thousandfold, with zeros, and a block of nothing else."""
    size = torch.exp2(noise(rows, columns, seed=seed + 1, dtype=torch.float32) * 4)
    x = noise(rows, columns, seed=seed, dtype=torch.float32) * size
    x[:, ::7] = 0.0
    x[0, :32] = 0.0
    return x


@everyone
@pytest.mark.parametrize("gradient", [False, True])
def test_numbers_are_those_of_exact_arithmetic(format: Format, gradient: bool) -> None:
    # 83 is no multiple of a block. Powers of two and sizes near the ends of fp32's range as well.
    rows = torch.cat([wide(6, 83), wide(2, 83) * 2.0**-120, torch.exp2(wide(2, 83).clamp(-9, 9))])
    for x in (rows, rows[2:3], rows.bfloat16()):
        got = quantise(x, format, gradient=gradient).dequantise()
        want = quantised(format, x.tolist(), gradient)
        assert got.tolist() == [[float(value) for value in row] for row in want]


@everyone
def test_numbers_are_those_of_the_naive_search(format: Format) -> None:
    x = wide(5, 70, seed=3)
    got = quantise(x, format).dequantise()
    assert torch.equal(got, quantise_naive(x, format).float())


def all_values(format: Format) -> Tensor:
    """Every value of the grid under the scales a block can have, a row of blocks a scale."""
    values = format.grid(gradient=False).values()
    values = torch.cat([values, -values])
    if isinstance(format, NVFP4):
        # A block holds all 16 codes; the largest number, 448 * 6, makes the matrix's scale 1.
        return E4M3.values()[1:, None] * values
    block = format.BLOCK or len(values)
    # Each block holds the largest value too, so that its scale is what the values are times.
    rows = torch.cat([F.pad(row, (1, 0), value=float(values.max())) for row in values.split(31)])
    scales = torch.exp2(torch.arange(-126.0, 110.0, 11.0))
    row = values if format.BLOCK is None else F.pad(rows, (0, -len(rows) % block))
    return scales[:, None] * row


@everyone
def test_every_representable_value_comes_back(format: Format) -> None:
    x = all_values(format)
    q = quantise(x, format)
    assert torch.equal(q.dequantise(), x)
    found = q.values().abs().unique()
    assert torch.equal(found, format.grid(gradient=False).values())


@everyone
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_either_dim_may_be_the_contracted_one(format: Format, dtype: torch.dtype) -> None:
    x = wide(21, 50).to(dtype)
    along, across = quantise(x, format, -1), quantise(x.T, format, -2)
    assert torch.equal(along.dequantise(), across.dequantise().T)
    assert torch.equal(along.values(), across.values().T)
    assert torch.equal(quantise(x.T.contiguous().T, format).values(), along.values())
    assert torch.equal(along.rows(), across.rows())
    batch = torch.stack([x, x.flip(0) * 3])
    for i, one in enumerate(batch):
        assert torch.equal(
            quantise(batch, format).dequantise()[i], quantise(one, format).dequantise()
        )


@everyone
def test_operands_are_exact_in_bf16(format: Format) -> None:
    q, half = (quantise(wide(9, 70), format, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert torch.equal(half.rows().double(), q.rows().double())
    factor = q.factor()
    value = q.rows() * (1.0 if factor is None else factor)
    assert torch.equal(value[:, :70], q.dequantise())
    assert not value[:, 70:].any()


@everyone
def test_zeros_stay_zeros(format: Format) -> None:
    for shape in ((3, 40), (0, 40), (3, 0)):
        got = quantise(torch.zeros(shape), format).dequantise()
        assert got.shape == shape and not got.any()
    assert quantise(-torch.zeros(2, 32), format).values().signbit().all()


@everyone
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_breaks_its_block_visibly(format: Format, broken: float) -> None:
    x = wide(4, 64)
    x[1, 40] = broken
    got = quantise(x, format).dequantise()
    if isinstance(format, NVFP4):
        assert got.isnan().all()
        return
    start = 0 if format.BLOCK is None else 32
    assert got[1, start:].isnan().all()
    kept = torch.ones(4, 64, dtype=torch.bool)
    kept[1, start:] = False
    assert got[kept].isfinite().all()


@everyone
def test_the_smallest_and_largest_numbers(format: Format) -> None:
    tiny, huge = torch.full((1, 32), 1e-44), torch.full((1, 32), 2.5e38)
    assert (quantise(huge, format).dequantise() >= 1.5e38).all()
    assert quantise(tiny, format).dequantise().isfinite().all()
    # An e4m3 scale or one row's cannot reach from 2.5e38 to 1e-44; zeros are what is left.
    both = quantise(torch.cat([huge, tiny], dim=1), format).dequantise()
    assert both.isfinite().all() and (both[:, 32:] < 1e-43).all()


def test_floor_saturates_and_rceil_does_not() -> None:
    x = torch.full((1, 32), 500.0)
    assert quantise(x, MXFP8("floor")).dequantise().unique().tolist() == [448.0]
    assert quantise(x, MXFP8("rceil")).dequantise().unique().tolist() == [512.0]
    assert quantise(x, MXFP8("rceil")).scale.unique().tolist() == [2.0]


@pytest.mark.parametrize("format", [MXFP8(), MXFP4("rceil")], ids=str)
def test_scales_are_powers_of_two_as_torch_has_them(format: Format) -> None:
    x = torch.cat(
        [wide(8, 64), wide(8, 64) * 2.0**-126, torch.zeros(1, 64), wide(2, 64) * 2.0**100]
    )
    scale = quantise(x, format).scale
    assert torch.equal(scale.to(torch.float8_e8m0fnu).float(), scale)
    assert scale.min() == 2.0**-127


def test_scales_of_nvfp4_are_e4m3_and_fp32() -> None:
    q = quantise(wide(8, 64), NVFP4())
    assert torch.equal(q.scale.to(torch.float8_e4m3fn).float(), q.scale)
    assert q.scale.max() == 448 and q.outer is not None and q.outer.numel() == 1
    assert q.scale.shape == (8, 4, 1)


def test_formats_of_four_bits_differ() -> None:
    x = noise(64, 256, dtype=torch.float32)
    errors = {}
    for format in (MXFP4(), MXFP4("rceil"), NVFP4(), MXFP8(), FP8()):
        got = quantise(x, format).dequantise()
        errors[format] = float((got - x).norm() / x.norm())
    four = [errors[MXFP4()], errors[MXFP4("rceil")], errors[NVFP4()]]
    assert len(set(four)) == 3
    # Twice the blocks and finer scales; eight bits are closer still.
    assert errors[NVFP4()] < 0.85 * min(four[:2])
    assert max(errors[MXFP8()], errors[FP8()]) < 0.4 * errors[NVFP4()]


def odd(rows: int, columns: int) -> Tensor:
    """Numbers of all sizes, ties among them, and what is none."""
    x = wide(rows, columns) * torch.exp2(torch.linspace(-140, 110, rows).round())[:, None]
    x[rows // 2, : columns // 2] = torch.arange(columns // 2) * 0.25 - 3
    x[1, 5], x[2, columns - 1], x[3, 0], x[rows - 1, 0] = math.nan, math.inf, -math.inf, -0.0
    return x


@everyone
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.skipif(missing() is not None, reason=f"no native kernels: {missing()}")
def test_the_kernel_rounds_as_torch_does_to_the_last_bit(format: Format, gradient: bool) -> None:
    plain, native = BACKENDS["plain"], BACKENDS["native"]
    grid = format.grid(gradient)
    matrices = (odd(37, 83), odd(64, 96).bfloat16(), odd(6, 200).view(2, 3, 200), odd(5, 7)[:0])
    for x in (*matrices, odd(33, 40).T, odd(5, 7)[:, :0]):
        for dim in (-1, -2):
            block = format.BLOCK or max(1, x.shape[dim])
            amax = plain.largest(x, dim, block)
            assert torch.equal(_bits(amax), _bits(native.largest(x, dim, block)))
            scale, outer = format.scales(amax, torch.tensor(3000.0), grid)
            total = torch.where(
                amax.isfinite(), scale if outer is None else scale * outer, math.nan
            )
            inner = None if format.BLOCK is None else scale
            for dtype in (torch.float32, torch.bfloat16):
                given = (x, dim, block, grid, total, inner, dtype)
                truth, mine = plain.nearest(*given), native.nearest(*given)
                assert truth.dtype == mine.dtype == dtype
                assert torch.equal(_bits(truth), _bits(mine))


def _bits(x: Tensor) -> Tensor:
    """The bits of numbers; all NaNs are one."""
    whole = torch.int16 if x.dtype == torch.bfloat16 else torch.int32
    return torch.where(x.isnan(), torch.nan, x).to(x.dtype).contiguous().view(whole)


def test_the_rounding_in_use_is_named() -> None:
    here = "plain" if missing() else "native"
    assert choose(torch.zeros(2), torch.bfloat16) == here
    assert choose(torch.zeros(2, dtype=torch.float64), torch.bfloat16) == "plain"
    assert choose(torch.zeros(2, device="meta"), torch.bfloat16) == "plain"


@everyone
def test_chance_is_right_on_average_over_a_tensor(format: Format) -> None:
    x, num = noise(16, 88, dtype=torch.float32), 200
    near, generator = quantise(x, format), torch.Generator().manual_seed(0)
    draws = [quantise(x, format, stochastic=True, generator=generator) for _ in range(num)]
    assert all(torch.equal(draw.scale, near.scale) for draw in draws)
    limit = near.total() * format.grid(gradient=False).maximum
    cut = blocked(x, -1, format.BLOCK or 88).clamp(-limit, limit).flatten(-2)[:, :88]
    errors = torch.stack([draw.dequantise() - cut for draw in draws])
    typical = errors.square().sum((1, 2)).mean().sqrt()
    # The error of a mean shrinks with the root of the number of draws; a bias would not.
    assert errors.mean(0).norm() < 1.3 * typical / num**0.5


@everyone
def test_a_format_is_data(format: Format) -> None:
    assert from_json(Format, to_json(format)) == format


def test_errors_name_what_is_valid() -> None:
    with pytest.raises(ValueError, match=r"unknown number format 'nvfp8'.*did you mean"):
        from_json(Format, "nvfp8")
    with pytest.raises(ValueError, match="'ceil' is not valid"):
        from_json(Format, {"use": "mxfp8", "scale": "ceil"})
    with pytest.raises(ValueError, match="dim must be -1 or -2"):
        quantise(torch.zeros(3, 3), FP8(), 0)
