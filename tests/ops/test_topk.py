"""The k largest of each row, beside torch's."""

import pytest
import torch
from torch import Tensor

from moebius.ops.native import missing
from moebius.ops.topk import choose, topk
from moebius.ops.topk.native import topk_native

needs_native = pytest.mark.skipif(missing() is not None, reason=f"native kernels: {missing()}")
INFINITY = float("inf")


def distinct(rows: int, width: int, seed: int) -> Tensor:
    """Rows of values of both signs, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(width, generator=generator) for _ in range(rows)]
    return (torch.stack(order) - width // 2).float() / 7


@needs_native
@pytest.mark.parametrize(
    ("rows", "width", "k"),
    [(1, 1, 1), (7, 5, 5), (130, 16, 3), (64, 60, 4), (65, 96, 6), (3, 768, 32)],
)
def test_it_takes_what_torch_takes(rows: int, width: int, k: int) -> None:
    x_NE = distinct(rows, width, seed=k)
    assert choose(x_NE, k) == "native"
    index_NS = topk(x_NE, k)
    assert index_NS.dtype == torch.int64
    assert torch.equal(index_NS, x_NE.topk(k).indices)
    strided_NE = torch.cat((x_NE, x_NE), dim=1)[:, :width]
    assert torch.equal(topk(strided_NE, k), index_NS)


@needs_native
def test_of_equal_values_the_first_is_taken_and_none_twice() -> None:
    x_NE = torch.tensor([[2.0, 3.0, 3.0, 2.0, 2.0, -0.0, 0.0] + [-INFINITY] * 13])
    assert topk_native(x_NE, 7).tolist() == [[1, 2, 0, 3, 4, 5, 6]]
    assert topk_native(x_NE, 9).tolist() == [[1, 2, 0, 3, 4, 5, 6, 7, 8]]
    assert topk_native(torch.full((2, 40), 0.5), 20).tolist() == 2 * [list(range(20))]


@needs_native
def test_a_nan_is_larger_than_all() -> None:
    x_NE = distinct(4, 40, seed=0)
    x_NE[1, 17] = x_NE[3, 39] = float("nan")
    assert topk_native(x_NE, 4)[[1, 3], 0].tolist() == [17, 39]
    assert torch.equal(topk_native(x_NE, 4), x_NE.topk(4).indices)
    everything_NE = topk_native(torch.full((1, 20), float("nan")), 20)
    assert everything_NE.sort().values.tolist() == [list(range(20))]


@needs_native
def test_threads_change_nothing() -> None:
    x_NE = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    found: list[Tensor] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(topk_native(x_NE, 6))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_the_kernel_does_not_take_goes_to_torch() -> None:
    for x_NE, k in (
        (distinct(2, 8, 0).double(), 2),
        (distinct(2, 8, 0).bfloat16(), 2),
        (distinct(2, 5000, 0), 2),
        (distinct(2, 64, 0), 33),
        (distinct(4, 8, 0).view(2, 2, 8), 2),
    ):
        assert choose(x_NE, k) == "naive"
    with pytest.raises(RuntimeError, match="out of range"):
        topk(distinct(2, 8, 0), 9)
    assert topk(torch.empty(0, 8), 2).shape == (0, 2)
