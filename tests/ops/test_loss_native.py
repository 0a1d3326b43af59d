"""The native loss of a linear head against all logits at once, in fp64 from the same operands."""

import pytest
import torch
from torch import Tensor

from moebius.ops import native
from moebius.ops.loss import BACKENDS, choose, head_cross_entropy, head_cross_entropy_naive
from moebius.ops.loss.native import head_cross_entropy_native

from .compare import noise

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

Results = tuple[Tensor, Tensor, Tensor]


def inputs(count: int, width: int, vocab: int, size: float = 1.0) -> tuple[Tensor, ...]:
    """h in bf16, the fp32 master of w, targets, and valid tokens (about two in three)."""
    generator = torch.Generator().manual_seed(7)
    target_N = torch.randint(0, vocab, (count,), generator=generator)
    valid_N = torch.rand(count, generator=generator) < 0.67
    h_ND = (noise(count, width, seed=1) * size / width**0.5).bfloat16()
    return h_ND, noise(vocab, width, seed=2).float(), target_N, valid_N


def ours(h_ND: Tensor, w_VD: Tensor, target_N: Tensor, valid_N: Tensor) -> Results:
    h_ND, w_VD = h_ND.clone().requires_grad_(), w_VD.clone().requires_grad_()
    loss = head_cross_entropy_native(h_ND, w_VD, target_N, valid_N)
    loss.backward()
    assert loss.dtype == torch.float32
    assert h_ND.grad is not None and h_ND.grad.dtype == torch.bfloat16
    assert w_VD.grad is not None and w_VD.grad.dtype == torch.float32
    return loss.detach(), h_ND.grad, w_VD.grad


def truth(h_ND: Tensor, w_VD: Tensor, target_N: Tensor, valid_N: Tensor) -> Results:
    h_ND = h_ND.double().requires_grad_()
    w_VD = w_VD.bfloat16().double().requires_grad_()
    loss = head_cross_entropy_naive(h_ND, w_VD, target_N, valid_N)
    loss.backward()
    assert h_ND.grad is not None and w_VD.grad is not None
    return loss.detach(), h_ND.grad, w_VD.grad


def assert_near_truth(*tensors: Tensor) -> None:
    """The loss is exact but for fp32; gradients but for p - onehot, and dh itself, in bf16."""
    got, want = ours(*tensors), truth(*tensors)
    count = max(1, int(tensors[3].sum()))
    assert abs(float(got[0]) - float(want[0])) <= 2e-7 * abs(float(want[0])) + 2e-6 * count
    for fast, slow in zip(got[1:], want[1:], strict=True):
        assert fast.isfinite().all()
        error, scale = (fast.double() - slow).abs().max(), slow.abs().max()
        assert error <= 6e-3 * scale, f"off by {float(error):.3g} of {float(scale):.3g}"
        assert (fast.double() - slow).norm() <= 3e-3 * slow.norm()


# Tiles are of 32 tokens, products of 512; panels of 64 columns, products of 512.
@pytest.mark.parametrize(
    ("count", "width", "vocab"),
    [
        (1, 32, 16),
        (7, 32, 1),
        (31, 64, 64),
        (32, 96, 80),
        (33, 128, 577),
        (65, 32, 23),
        (300, 256, 1024),
        (1300, 64, 208),
    ],
)
def test_values_and_gradients(count: int, width: int, vocab: int) -> None:
    h_ND, w_VD, target_N, valid_N = inputs(count, width, vocab)
    valid_N[0] = True
    assert_near_truth(h_ND, w_VD, target_N, valid_N)
    assert_near_truth(h_ND, w_VD, target_N, torch.ones_like(valid_N))


@pytest.mark.parametrize("size", [0.0, 20.0])
def test_equal_and_large_logits(size: float) -> None:
    h_ND, w_VD, target_N, valid_N = inputs(40, 64, 700, size)
    logits = h_ND.double() @ w_VD.double().T
    assert float(logits.abs().max()) == 0.0 if size == 0.0 else float(logits.abs().max()) > 80
    if size == 0.0:
        loss, _, grad_w_VD = ours(h_ND, w_VD, target_N, valid_N)
        assert float(loss) == pytest.approx(int(valid_N.sum()) * torch.tensor(700.0).log().item())
        assert not grad_w_VD.any()
    assert_near_truth(h_ND, w_VD, target_N, valid_N)


def test_one_logit_above_all_others() -> None:
    """Far above what came before it, or far below; as target or not."""
    h_ND, w_VD, target_N, valid_N = inputs(33, 32, 200)
    h_ND[:, 0] = 16
    for place in (0, 63, 64, 199):
        for top in (-50.0, 50.0):
            w_VD[:, 0] = 0
            w_VD[place, 0] = top
            target_N[::2] = place
            assert_near_truth(h_ND, w_VD, target_N, valid_N)


def test_targets_at_the_ends_of_the_vocabulary() -> None:
    h_ND, w_VD, target_N, valid_N = inputs(64, 32, 130)
    target_N[:] = torch.tensor([0, 63, 64, 127, 128, 129, 0, 129]).repeat(8)
    assert_near_truth(h_ND, w_VD, target_N, valid_N)


def test_invalid_tokens_count_for_nothing() -> None:
    h_ND, w_VD, target_N, valid_N = inputs(50, 32, 100)
    target_N[~valid_N] = -100
    h_ND[~valid_N] = torch.nan
    loss, grad_h_ND, grad_w_VD = ours(h_ND, w_VD, target_N, valid_N)
    alone = ours(h_ND[valid_N], w_VD, target_N[valid_N], valid_N[valid_N])
    assert torch.equal(loss, alone[0])
    assert torch.equal(grad_h_ND[valid_N], alone[1]) and not grad_h_ND[~valid_N].any()
    assert torch.equal(grad_w_VD, alone[2])
    nothing = ours(h_ND, w_VD, target_N, torch.zeros_like(valid_N))
    assert not any(x.any() for x in nothing)
    empty = ours(h_ND[:0], w_VD, target_N[:0], valid_N[:0])
    assert float(empty[0]) == 0 and not empty[2].any()


def test_bits_do_not_depend_on_threads_or_calls() -> None:
    tensors = inputs(1300, 64, 1100)
    once, again = ours(*tensors), ours(*tensors)
    torch.set_num_threads(2)
    in_two, chunks = ours(*tensors), None
    torch.set_num_threads(9)
    chunks = ours(*tensors)
    for results in (again, in_two, chunks):
        assert all(torch.equal(x, y) for x, y in zip(once, results, strict=True))


def test_without_gradients_it_is_the_same() -> None:
    tensors = inputs(100, 32, 300)
    with torch.no_grad():
        without = head_cross_entropy_native(*tensors)
    assert torch.equal(without, ours(*tensors)[0])
    frozen = tensors[0].clone().requires_grad_()
    head_cross_entropy_native(frozen, *tensors[1:]).backward()
    assert frozen.grad is not None and torch.equal(frozen.grad, ours(*tensors)[1])
    weight = tensors[1].clone().requires_grad_()
    head_cross_entropy_native(tensors[0], weight, *tensors[2:]).backward()
    assert weight.grad is not None and torch.equal(weight.grad, ours(*tensors)[2])


def test_gradients_scale_with_what_follows_and_twice() -> None:
    h_ND, w_VD, target_N, valid_N = inputs(40, 32, 90)
    unit = ours(h_ND, w_VD, target_N, valid_N)
    leaves = (h_ND.clone().requires_grad_(), w_VD.clone().requires_grad_())
    loss = head_cross_entropy_native(*leaves, target_N, valid_N) * 0.7
    for times in (1, 2):
        loss.backward(retain_graph=True)
        for leaf, grad in zip(leaves, unit[1:], strict=True):
            assert leaf.grad is not None
            torch.testing.assert_close(
                leaf.grad.double(), grad.double() * 0.7 * times, rtol=4e-3, atol=0
            )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    """One bad weight, in a column after the largest logit, must not pass for a finite loss."""
    h_ND, w_VD, target_N, valid_N = inputs(40, 32, 90)
    w_VD[70, 3] = bad
    loss, grad_h_ND, _ = ours(h_ND, w_VD, target_N, valid_N)
    assert not loss.isfinite() and not grad_h_ND.isfinite().all()


def test_what_it_cannot_take_is_refused() -> None:
    h_ND, w_VD, target_N, valid_N = inputs(8, 32, 50)
    for wrong in (-1, 50):
        target_N[valid_N] = wrong
        with pytest.raises(ValueError, match="0 to 49"):
            head_cross_entropy_native(h_ND, w_VD, target_N, valid_N)
    with pytest.raises(ValueError, match="multiple of 32"):
        head_cross_entropy_native(h_ND[:, :30], w_VD[:, :30], target_N, valid_N)


def test_it_is_chosen_where_it_fits() -> None:
    cpu = torch.device("cpu")
    assert choose(cpu, torch.bfloat16, 256) == "native"
    assert choose(cpu, torch.bfloat16, 250) == choose(cpu, torch.float32, 256) == "chunked"
    assert choose(torch.device("cuda"), torch.bfloat16, 256) == "chunked"
    h_ND, w_VD, target_N, valid_N = inputs(40, 32, 90)
    found = head_cross_entropy(h_ND, w_VD, target_N, valid_N)
    assert torch.equal(found, BACKENDS["native"](h_ND, w_VD, target_N, valid_N))
