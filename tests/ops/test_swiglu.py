"""SwiGLU is its formula, by every backend."""

import pytest
import torch

from moebius.ops import native
from moebius.ops.swiglu import BACKENDS, choose, swiglu

from .compare import assert_same, noise


def test_swiglu_takes_the_gate_first() -> None:
    gate, up = noise(3, 4), noise(3, 4, seed=1)
    want = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(swiglu(torch.cat([gate, up], dim=-1)), want)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (70, 48)])
@pytest.mark.parametrize("size", [1.0, 50.0])
def test_the_native_swiglu_is_the_naive_one(rows: int, width: int, size: float) -> None:
    gate_up = (size * noise(2, rows, 2 * width)).bfloat16()
    assert choose(gate_up) == "native"
    assert_same(
        lambda inputs: BACKENDS["native"](inputs["gate_up"]),
        lambda inputs: BACKENDS["naive"](inputs["gate_up"].double()).to(torch.bfloat16),
        {"gate_up": gate_up},
        1e-2,
    )
