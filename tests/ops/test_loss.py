"""The loss of a linear head in chunks of tokens, on any device, against all logits at once."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moebius.ops.loss.chunked import head_cross_entropy_chunked as chunked
from moebius.ops.loss.naive import head_cross_entropy_naive as naive

from .compare import TOLERANCE, assert_same, noise

VOCAB, WIDTH = 23, 6


def tokens(count: int, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Targets, and which of them count (about two in three)."""
    generator = torch.Generator().manual_seed(seed)
    target_N = torch.randint(0, VOCAB, (count,), generator=generator)
    return target_N, torch.rand(count, generator=generator) < 0.67


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("count", "chunk"), [(1, 4), (12, 4), (13, 4), (13, 1), (5, 100), (64, 7)])
def test_chunked_equals_naive(count: int, chunk: int, dtype: torch.dtype) -> None:
    target_N, valid_N = tokens(count)
    valid_N[0] = True
    master = torch.promote_types(dtype, torch.float32)
    inputs = {
        "h": noise(count, WIDTH, seed=1, dtype=dtype),
        "w": noise(VOCAB, WIDTH, seed=2, dtype=master),
    }
    assert_same(
        lambda x: chunked(x["h"], x["w"], target_N, valid_N, chunk),
        lambda x: naive(x["h"], x["w"], target_N, valid_N),
        inputs,
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_without_gradients_it_is_the_same(dtype: torch.dtype) -> None:
    target_N, valid_N = tokens(13)
    h_ND, w_VD = noise(13, WIDTH, seed=1, dtype=dtype), noise(VOCAB, WIDTH, seed=2, dtype=dtype)
    with_grad = chunked(h_ND, w_VD, target_N, valid_N, 4)
    with torch.no_grad():
        without = chunked(h_ND, w_VD, target_N, valid_N, 4)
    assert without.dtype == with_grad.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(without, with_grad)


@pytest.mark.parametrize("grad", [True, False])
def test_invalid_rows_count_for_nothing(grad: bool) -> None:
    target_N, valid_N = tokens(13)
    h_ND = noise(13, WIDTH, seed=1).requires_grad_()
    w_VD = noise(VOCAB, WIDTH, seed=2)
    with torch.set_grad_enabled(grad):
        loss = chunked(h_ND, w_VD, target_N, valid_N, 4)
        alone = chunked(h_ND[valid_N], w_VD, target_N[valid_N], valid_N[valid_N], 4)
        nothing = chunked(h_ND, w_VD, target_N, torch.zeros_like(valid_N), 4)
    torch.testing.assert_close(loss, alone)
    assert float(nothing.detach()) == 0.0
    if grad:
        loss.backward()
        assert h_ND.grad is not None
        assert not h_ND.grad[~valid_N].any() and h_ND.grad[valid_N].all()


def test_gradients_scale_with_what_follows() -> None:
    """The forward holds the gradients of a unit loss; the backward must scale them."""
    target_N, valid_N = tokens(13)
    inputs = {"h": noise(13, WIDTH, seed=1), "w": noise(VOCAB, WIDTH, seed=2)}
    assert_same(
        lambda x: (chunked(x["h"], x["w"], target_N, valid_N, 4) / 37.0).square(),
        lambda x: (naive(x["h"], x["w"], target_N, valid_N) / 37.0).square(),
        inputs,
        1e-11,
    )


class _LargestRows(TorchDispatchMode):
    """The most rows of any V-wide tensor that an operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == VOCAB:
            self.rows = max(self.rows, out.shape[0])
        return out


@pytest.mark.parametrize("grad", [True, False])
def test_no_more_logits_than_a_chunk_exist(grad: bool) -> None:
    target_N, valid_N = tokens(50)
    h_ND = noise(50, WIDTH, seed=1).requires_grad_()
    w_VD = noise(VOCAB, WIDTH, seed=2).requires_grad_()
    with _LargestRows() as seen, torch.set_grad_enabled(grad):
        loss = chunked(h_ND, w_VD, target_N, valid_N, 8)
        if grad:
            loss.backward()
    assert seen.rows == 8
