"""Products in each format: values and gradients against the naive twin; what is rounded when."""

from functools import partial
from typing import Literal

import pytest
import torch
from torch import Tensor

from moebius.ops.formats import Format, Product, choose, multiply, quantise
from moebius.ops.formats.fp8 import FP8
from moebius.ops.formats.mx import MXFP4, MXFP8
from moebius.ops.formats.naive import product_naive, quantise_naive
from moebius.ops.formats.native import scale_native
from moebius.ops.formats.nvfp4 import NVFP4
from moebius.ops.formats.plain import scale_plain
from moebius.ops.formats.product import contract_emulated
from moebius.ops.formats.scaled import contract_scaled
from moebius.ops.linear import linear
from moebius.ops.native import missing

from ..compare import noise

FORMATS: list[Format] = [FP8(), FP8("e5m2"), MXFP8(), MXFP4("rceil"), NVFP4()]
everyone = pytest.mark.parametrize("format", FORMATS, ids=str)
# By the dtype of activations: how far sums of exact products may lie apart, norm-wise.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float32: 1e-6, torch.float64: 1e-13}


def computed(x: Tensor, w: Tensor, grad: Tensor, product: Product) -> tuple[Tensor, Tensor, Tensor]:
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = multiply(x, w, product)
    y.backward(grad)
    assert x.grad is not None and w.grad is not None
    assert y.dtype == x.grad.dtype == x.dtype and w.grad.dtype == w.dtype
    return y.detach(), x.grad, w.grad


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert float((got.double() - want.double()).norm() / want.double().norm()) < tolerance


@everyone
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backward", ["none", "input", "both"])
def test_products_equal_naive(
    format: Format, dtype: torch.dtype, backward: Literal["none", "input", "both"]
) -> None:
    master = torch.promote_types(dtype, torch.float32)
    x, grad = noise(37, 50, dtype=dtype), noise(37, 21, seed=2, dtype=dtype) * 1e-4
    w, product = noise(21, 50, seed=1, dtype=master), Product(format, backward)
    got, want = computed(x, w, grad, product), product_naive(x, w, grad, product)
    for mine, truth in zip(got, want, strict=True):
        assert_near(mine, truth, TOLERANCE[dtype])


@pytest.mark.skipif(missing() is not None, reason=f"no native kernels: {missing()}")
def test_the_kernel_scales_a_product_as_torch_does_to_the_last_bit() -> None:
    x = noise(37, 53, dtype=torch.bfloat16)
    rows, columns = noise(37, 1, dtype=torch.float32), noise(53, 1, dtype=torch.float32)
    for row, column in ((rows, columns), (rows[:1], columns[:1]), (rows * 1e-30, columns * 1e-9)):
        want = scale_plain(x, row, column.mT)
        assert torch.equal(scale_native(x.clone(), row, column.mT), want)


@everyone
def test_only_the_products_asked_for_are_rounded(format: Format) -> None:
    x, w, grad = noise(40, 64), noise(24, 64, seed=1), noise(40, 24, seed=2)
    plain = (x @ w.T, grad @ w, grad.T @ x)
    rounded = {"none": (0,), "input": (0, 1), "both": (0, 1, 2)}
    for backward in ("none", "input", "both"):
        got = computed(x, w, grad, Product(format, backward))
        for i in range(3):
            error = float((got[i] - plain[i]).norm() / plain[i].norm())
            assert (error > 5e-3) == (i in rounded[backward]), (backward, i, error)


@everyone
def test_masters_are_rounded_once(format: Format) -> None:
    """A master is quantised as it is: by way of bf16 it would at times round twice."""
    x = torch.eye(64, dtype=torch.bfloat16)
    w = torch.cat([noise(512, 64, dtype=torch.float32) * 0.02, torch.eye(64)])
    got = multiply(x, w, Product(format)).T.double()
    once = quantise(w, format).dequantise().double()
    twice = quantise(w.bfloat16().float(), format).dequantise().double()
    assert float((got - once).norm()) < 0.4 * float((got - twice).norm())


def test_a_batch_of_sequences_and_no_rows() -> None:
    x, w = noise(2, 5, 40, dtype=torch.float32), noise(8, 40, seed=1, dtype=torch.float32)
    for format in FORMATS:
        y = multiply(x, w, Product(format))
        assert torch.equal(y, multiply(x.flatten(0, 1), w, Product(format)).view(2, 5, 8))
        got = computed(x[0, :0], w, torch.zeros(0, 8), Product(format))
        assert [tuple(part.shape) for part in got] == [(0, 8), (0, 40), (8, 40)]
        assert not got[2].any()


@everyone
def test_a_broken_gradient_stays_broken(format: Format) -> None:
    x, w, grad = (noise(16, 16, seed=i, dtype=torch.float32) for i in range(3))
    grad[3, 5] = torch.inf
    _, dx, dw = computed(x, w, grad, Product(format))
    assert not dx[3].isfinite().any() and not dw[5].isfinite().any()


@everyone
def test_chance_moves_gradients_alone_and_is_right_on_average(format: Format) -> None:
    x, w, grad = (noise(32, 32, seed=i, dtype=torch.float32) for i in range(3))
    torch.manual_seed(0)
    near = computed(x, w, grad, Product(format))
    draws = [computed(x, w, grad, Product(format, stochastic=True)) for _ in range(150)]
    assert all(torch.equal(draw[0], near[0]) for draw in draws)
    # What dx and dw become if only x and w are rounded.
    dx = grad.double() @ quantise_naive(w.T, format).T
    dw = grad.double().T @ quantise_naive(x.T, format).T
    for i, truth in ((1, dx), (2, dw)):
        errors = torch.stack([draw[i] for draw in draws]).double() - truth
        assert errors[0].abs().max() > 0
        if isinstance(format, FP8 | NVFP4 | MXFP4):
            # The others cut what exceeds their scale, and so do not hit the mean.
            typical = errors.square().sum((1, 2)).mean().sqrt()
            limit = 0.25 if isinstance(format, NVFP4) else 1.3 / 150**0.5
            assert errors.mean(0).norm() < limit * typical
    torch.manual_seed(0)
    again = computed(x, w, grad, Product(format, stochastic=True))
    assert all(torch.equal(a, b) for a, b in zip(again, draws[0], strict=True))


def test_formats_of_four_bits_give_other_products() -> None:
    x, w = noise(64, 128, dtype=torch.float32), noise(32, 128, seed=1, dtype=torch.float32)
    truth = x @ w.T
    errors = {
        format: float((multiply(x, w, Product(format)) - truth).norm() / truth.norm())
        for format in (MXFP4(), NVFP4(), MXFP8())
    }
    assert errors[MXFP8()] < 0.5 * errors[NVFP4()] < 0.45 * errors[MXFP4()]


def test_a_plain_weight_is_multiplied_as_ever() -> None:
    x, w, b = noise(4, 6), noise(3, 6, seed=1), noise(3, seed=2)
    assert torch.equal(linear(x, w, b), torch.nn.functional.linear(x, w, b))


def test_who_watches_is_shown_what_was_lost() -> None:
    seen: dict[str, float] = {}
    x = torch.ones(16, 32)
    # Of the two small numbers a row one is overwritten, by the only outlier.
    x[:, :2], x[0, 0] = 1e-6, 448.0
    w = torch.ones(8, 32, requires_grad=True)
    y = multiply(
        x.requires_grad_(), w, Product(FP8()), lambda name, x: seen.update({name: float(x)})
    )
    y.backward(torch.ones(16, 8))
    names = {f"{kind}/{what}" for kind in ("underflow", "saturated", "outliers") for what in "xw"}
    assert seen.keys() == names | {f"{kind}/dy" for kind in ("underflow", "saturated", "outliers")}
    assert seen["underflow/x"] == 31 / 512 and seen["outliers/x"] == 1 / 512
    assert all(value == 0 for name, value in seen.items() if name.endswith(("w", "dy")))


def test_the_choice_is_by_name() -> None:
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    assert choose(FP8(), cpu, bf16, (64, 64, 64)) == "emulated"
    for format in (MXFP8(), MXFP4(), NVFP4(), FP8("e5m2")):
        assert choose(format, torch.device("cuda"), bf16, (64, 64, 64)) == "emulated"
    assert choose(FP8(), torch.device("cuda"), torch.float32, (64, 64, 64)) == "emulated"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="native fp8 needs a CUDA device")
def test_native_fp8_equals_the_emulation() -> None:
    device = torch.device("cuda")
    if torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("native fp8 needs compute capability 9")
    assert choose(FP8(), device, torch.bfloat16, (256, 512, 128)) == "scaled"
    assert choose(FP8(), device, torch.bfloat16, (250, 512, 128)) == "emulated"
    x = noise(256, 512, dtype=torch.bfloat16).to(device)
    w = noise(128, 512, seed=1, dtype=torch.float32).to(device)
    half = partial(quantise, format=FP8(), dtype=torch.bfloat16)
    for a, b in (
        (half(x, dim=-1), half(w, dim=-1)),
        (half(x, dim=-2), half(x, dim=-2)),
    ):
        got, want = (f(a, b) for f in (contract_scaled, contract_emulated))
        assert_near(got, want, 6e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a CUDA device")
@everyone
def test_formats_are_the_same_on_every_device(format: Format) -> None:
    x = noise(300, 200, dtype=torch.float32) * torch.exp(4 * noise(300, 1, dtype=torch.float32))
    here, there = quantise(x, format), quantise(x.cuda(), format)
    assert torch.equal(here.dequantise(), there.dequantise().cpu())
