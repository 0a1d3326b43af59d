"""Rotary positions against multiplication by complex numbers."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from moebius.ops.native import missing
from moebius.ops.rope import BACKENDS, rotate

from .compare import TOLERANCE, assert_same, noise


def rotate_complex(x_BTHR: Tensor, position_BT: Tensor, base: float) -> Tensor:
    """Pairs (2i, 2i+1) as complex numbers, times exp(i * position * base^(-2i/R))."""
    width = x_BTHR.shape[-1]
    rate_P = torch.tensor(
        [base ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64
    )
    angle_BT1P = (position_BT[..., None] * rate_P)[:, :, None]
    pair_BTHP = torch.view_as_complex(x_BTHR.double().unflatten(-1, (-1, 2)).contiguous())
    turned_BTHP = pair_BTHP * torch.polar(torch.ones_like(angle_BT1P), angle_BT1P)
    return torch.view_as_real(turned_BTHP).flatten(-2).to(x_BTHR.dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("base", [100.0, 10_000.0, 1e6])
@pytest.mark.parametrize("width", [2, 6, 64])
def test_rotate_equals_complex_numbers(width: int, base: float, dtype: torch.dtype) -> None:
    position_BT = torch.tensor([[0, 1, 2, 3, 0, 1], [7, 8, 9, 10, 11, 12]])
    assert_same(
        lambda x: rotate(x["x"], position_BT, base),
        lambda x: rotate_complex(x["x"], position_BT, base),
        {"x": noise(2, 6, 3, width, dtype=dtype)},
        TOLERANCE[dtype],
    )


def test_products_depend_on_the_distance_alone() -> None:
    q, k = noise(1, 1, 1, 8, seed=1), noise(1, 1, 1, 8, seed=2)

    def product(query: int, key: int) -> Tensor:
        turned = [rotate(x, torch.tensor([[at]]), 50.0) for x, at in ((q, query), (k, key))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100))
    assert abs(float(product(9, 4) - product(9, 5))) > 1e-3


def test_position_zero_is_left_alone() -> None:
    x = noise(1, 3, 2, 8)
    assert torch.equal(rotate(x, torch.zeros(1, 3, dtype=torch.int64), 1e4), x)


def test_fp32_angles_hold_at_long_contexts() -> None:
    """At position 100,000 the angle is rounded to about 0.004; bf16 angles would be nonsense."""
    position_BT = torch.tensor([[100_000]])
    x = noise(1, 1, 1, 64, dtype=torch.float32)
    error = rotate(x, position_BT, 1e6) - rotate_complex(x, position_BT, 1e6)
    assert float(error.abs().max()) < 0.02


@pytest.mark.parametrize("rotated", [2, 16, 24])
@pytest.mark.parametrize("apart", [False, True])
def test_backends_turn_the_last_dims_alike(rotated: int, apart: bool) -> None:
    x_BTHK = noise(2, 5, 3, 40)[..., :30] if apart else noise(2, 5, 3, 30)
    x_BTHK, angle_BTP = x_BTHK.bfloat16(), noise(2, 5, rotated // 2, seed=1).float()
    names = ["naive"] if missing() else ["naive", "native"]

    def formula(inputs: Mapping[str, Tensor]) -> Tensor:
        x = inputs["x"].double()
        cos, sin = angle_BTP.double().cos()[:, :, None], angle_BTP.double().sin()[:, :, None]
        still = x.shape[-1] - rotated
        even, odd = x[..., still::2], x[..., still + 1 :: 2]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
        return torch.cat([x[..., :still], 1.5 * turned], dim=-1).to(x_BTHK.dtype)

    for name in names:
        backend = BACKENDS[name]
        assert_same(lambda i, op=backend: op(i["x"], angle_BTP, 1.5), formula, {"x": x_BTHK}, 1e-2)
