"""RMSNorm is its formula, by every backend, for rows that lie apart as well."""

import pytest
import torch
from torch import Tensor

from moebius.ops import native
from moebius.ops.norm import BACKENDS, choose, rms_norm

from .compare import assert_same, noise


def formula(x: Tensor, w_D: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w_D


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rms_norm_is_its_formula(dtype: torch.dtype) -> None:
    x, w_D = noise(5, 8, dtype=dtype), 1 + noise(8, seed=1).float()
    got = rms_norm(x, w_D, 0.01)
    assert got.dtype == dtype
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    want = formula(x.double(), w_D.double(), 0.01)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
@pytest.mark.parametrize("width", [1, 16, 40, 256])
@pytest.mark.parametrize("apart", [False, True])
def test_the_native_norm_is_the_formula(width: int, apart: bool) -> None:
    x = noise(3, 70, width, dtype=torch.bfloat16)
    if apart:
        x = noise(3, 70, width + 7, dtype=torch.bfloat16)[..., :width]
    w_D = 1 + 0.1 * noise(width, seed=1).float()
    assert choose(x, w_D) == "native"
    assert_same(
        lambda inputs: BACKENDS["native"](inputs["x"], inputs["w_D"], 1e-6),
        lambda inputs: formula(inputs["x"].double(), inputs["w_D"].double(), 1e-6).to(x.dtype),
        {"x": x, "w_D": w_D},
        2e-2,
    )


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_threads_do_not_change_a_bit() -> None:
    x, w_D = noise(200, 48, dtype=torch.bfloat16), noise(48, seed=1).float()
    results: list[list[Tensor]] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaves = x.clone().requires_grad_(), w_D.clone().requires_grad_()
        y = BACKENDS["native"](*leaves, 1e-6)
        results.append([y, *torch.autograd.grad(y, leaves, x)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
