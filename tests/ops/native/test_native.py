"""The layouts and functions that native kernels share, against torch."""

from pathlib import Path

import pytest
import torch

from moebius.ops import native

SOURCE = Path(native.__file__).with_name("probe.cpp")
pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 32), (5, 80, 64), (64, 64, 32), (33, 208, 96)])
def test_packed_products_are_those_of_torch(m: int, n: int, k: int) -> None:
    a, b = normal(m, k).bfloat16(), normal(k, n)
    c, c_too = torch.empty(m, n), torch.empty(m, n)
    transposed = b.bfloat16().T.contiguous()
    tensors = [native.address(x) for x in (a, b, transposed, c, c_too)]
    sizes = [native.integer(x) for x in (m, n, k)]
    native.library(SOURCE).probe_product(*tensors, *sizes)
    truth = a.float() @ b.bfloat16().float()
    torch.testing.assert_close(c, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(c_too, 2 * truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("k", "n"), [(32, 16), (96, 48)])
def test_transposes_are_exact(k: int, n: int) -> None:
    x, out = normal(k, n), torch.empty(n, k, dtype=torch.bfloat16)
    sizes = (native.integer(k), native.integer(n))
    native.library(SOURCE).probe_transpose(native.address(x), native.address(out), *sizes)
    assert torch.equal(out, x.T.bfloat16())


def test_exponentials_are_near_those_of_torch() -> None:
    x = torch.cat([torch.linspace(-86, 87, 1000), torch.tensor([0.0, -100.0, -1e30])])
    y, sigmoid = torch.empty_like(x), torch.empty_like(x)
    addresses = [native.address(t) for t in (x, y, sigmoid)]
    native.library(SOURCE).probe_exp(*addresses, native.integer(len(x)))
    torch.testing.assert_close(y[:-2], x[:-2].double().exp().float(), rtol=5e-7, atol=0)
    assert y[-2] == y[-1] == 0
    torch.testing.assert_close(sigmoid, x.sigmoid(), rtol=1e-6, atol=1e-37)


def test_a_strided_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        native.address(normal(4, 4).T)
