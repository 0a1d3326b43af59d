"""The native Newton-Schulz is as exact as torch's, and the same on any number of threads."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from moebius.ops import native
from moebius.ops.native import missing
from moebius.ops.orthogonal import BACKENDS, Iteration, Stack, choose, orthogonal_, step_native
from moebius.ops.orthogonal import native as kernel
from moebius.optim.orthogonal import polar_iteration, quintic_iteration

from .compare import noise

POLAR, QUINTIC = polar_iteration(5, 1e-7), quintic_iteration(5, 1e-7)
# What five steps in bf16 are off by, torch's as well.
BF16 = 0.04
SHAPES = [(32, 32), (32, 320), (96, 96), (160, 64), (192, 256), (256, 192), (128, 512)]

needs_kernels = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def through_singular_values(x: Tensor, iteration: Iteration) -> Tensor:
    """The iteration, written as what it does to the singular values."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    power = 2 if iteration.bound == "frobenius" else 4
    size = iteration.margin * s.pow(power).sum(-1, keepdim=True).pow(1 / power)
    s = s / size.clamp(min=iteration.eps)
    for a, b, c in iteration.polynomials:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag_embed(s) @ vh


def distance(x: Tensor, want: Tensor) -> float:
    return float((x.double() - want).norm() / want.norm())


@pytest.mark.parametrize("iteration", [POLAR, QUINTIC], ids=["polar", "quintic"])
@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_the_iteration_is_its_polynomials(shape: tuple[int, int], iteration: Iteration) -> None:
    x = noise(2, *shape)
    want = through_singular_values(x, iteration)
    torch.testing.assert_close(orthogonal_(x.clone(), iteration), want, rtol=0, atol=1e-9)


@needs_kernels
@pytest.mark.parametrize("iteration", [POLAR, QUINTIC], ids=["polar", "quintic"])
@pytest.mark.parametrize("size", [1.0, 1e-5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_native_iteration_is_as_exact_as_torchs(
    shape: tuple[int, int], size: float, iteration: Iteration
) -> None:
    x = (size * noise(2, *shape)).bfloat16()
    assert choose(x, x.dtype) == "native"
    want = through_singular_values(x, iteration)
    native = distance(BACKENDS["native"](x.clone(), iteration), want)
    assert native <= 1.2 * distance(BACKENDS["naive"](x.clone(), iteration), want)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_exact_without_amx(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8")
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, *flags))
    monkeypatch.setattr(kernel, "library", native.library.__wrapped__)
    x = noise(2, *shape).bfloat16()
    want = through_singular_values(x, POLAR)
    found = distance(BACKENDS["native"](x.clone(), POLAR), want)
    assert found <= 1.2 * distance(BACKENDS["naive"](x.clone(), POLAR), want)


@needs_kernels
def test_matrices_below_eps_are_divided_by_eps_and_zeros_stay_zero() -> None:
    tiny = (1e-11 * noise(1, 64, 96)).bfloat16()
    x = torch.cat([tiny, torch.zeros_like(tiny)])
    got = orthogonal_(x.clone(), POLAR)
    assert distance(got[:1], through_singular_values(tiny, POLAR)) < BF16
    assert not got[1].any()


@needs_kernels
@pytest.mark.parametrize("bound", [polar_iteration, quintic_iteration])
def test_zeros_stay_zero_with_the_smallest_eps(
    bound: Callable[[int, float], Iteration],
) -> None:
    zeros = torch.zeros(1, 64, 96, dtype=torch.bfloat16)
    assert torch.equal(orthogonal_(zeros.clone(), bound(5, 1e-30)), zeros)


@needs_kernels
@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_neither_neighbours_nor_threads_change_a_bit(
    shape: tuple[int, int], set_threads: Callable[[int], None]
) -> None:
    x = noise(5, *shape).bfloat16()
    set_threads(1)
    together = orthogonal_(x.clone(), POLAR)
    alone = torch.cat([orthogonal_(matrix[None].clone(), POLAR) for matrix in x])
    set_threads(2)
    assert torch.equal(alone, together)
    assert torch.equal(orthogonal_(x.clone(), POLAR), together)


@needs_kernels
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_native_step_moves_momentum_and_weights_of_all_shapes(
    nesterov: bool, set_threads: Callable[[int], None]
) -> None:
    shapes, rate, keep, momentum = [(3, 32, 64), (1, 128, 96), (2, 96, 96)], 0.3, 0.9, 0.8

    def stacks() -> list[Stack]:
        made = [[noise(*s, seed=seed, dtype=torch.float32) for seed in range(3)] for s in shapes]
        return [Stack(w, g, m, rate * (i + 1)) for i, (w, g, m) in enumerate(made)]

    results: list[list[Stack]] = []
    for threads in (1, 2):
        set_threads(threads)
        results.append(stacks())
        step_native(results[-1], POLAR, keep=keep, momentum=momentum, nesterov=nesterov)
    for before, after, again in zip(stacks(), *results, strict=True):
        assert torch.equal(after.weight_MRC, again.weight_MRC)
        assert torch.equal(after.momentum_MRC, again.momentum_MRC)
        grad, weight = before.grad_MRC.double(), before.weight_MRC.double()
        moved = momentum * before.momentum_MRC.double() + (1 - momentum) * grad
        assert torch.equal(after.grad_MRC, before.grad_MRC)
        assert distance(after.momentum_MRC, moved) < 1e-6
        direction = momentum * moved + (1 - momentum) * grad if nesterov else moved
        update = (keep * weight - after.weight_MRC) / before.rate
        assert distance(update, through_singular_values(direction, POLAR)) < BF16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_and_odd_sizes_are_left_to_torch(dtype: torch.dtype) -> None:
    assert choose(noise(1, 64, 64).to(dtype), dtype) == "naive"
    assert choose(noise(1, 64, 48).bfloat16(), torch.bfloat16) == "naive"
