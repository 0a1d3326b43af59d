"""Weights follow the activations' dtype; gradients come back in the weights' own."""

import pytest
import torch
import torch.nn.functional as F

from moebius.ops.linear import at_least_fp32, linear

from .compare import noise


def test_at_least_fp32_promotes_and_never_forces_down() -> None:
    kinds = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    want = (torch.float32, torch.float32, torch.float32, torch.float64)
    assert tuple(at_least_fp32(dtype) for dtype in kinds) == want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_linear_computes_in_the_activations_dtype(dtype: torch.dtype) -> None:
    x, w = noise(5, 3, dtype=dtype), noise(4, 3, seed=1, dtype=torch.float32).requires_grad_()
    y = linear(x, w)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.linear(x, w.detach().to(dtype)))
    y.sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32
