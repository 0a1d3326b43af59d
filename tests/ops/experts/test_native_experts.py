"""The native expert kernel: near exact on its own operands, the same whatever the threads."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moebius.ops.experts import experts
from moebius.ops.experts.naive import experts_naive
from moebius.ops.experts.native import experts_native
from moebius.ops.native import missing

from ..compare import noise

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
NAMES = ("value", "x", "weight", "w_gate_up", "w_down")
# name -> tokens, selected, experts, zero experts, D, F
SHAPES = {
    "one_token": (1, 1, 3, 0, 32, 32),
    "one_selected": (77, 1, 4, 0, 64, 32),
    "ragged": (301, 3, 7, 2, 96, 64),
    "wide": (150, 4, 9, 0, 160, 224),
    "more_experts_than_rows": (5, 2, 40, 4, 32, 96),
    "zero_experts_mostly": (64, 6, 2, 12, 64, 64),
    "many_rows": (1500, 2, 3, 0, 32, 32),
}


def routed(tokens: int, selected: int, outputs: int) -> Tensor:
    return noise(tokens, outputs, seed=7).topk(selected).indices


def leaves_of(
    tokens: int, selected: int, num_experts: int, width: int, hidden: int
) -> list[Tensor]:
    return [
        noise(tokens, width, seed=1).bfloat16(),
        noise(tokens, selected, seed=2).float(),
        (noise(num_experts, 2 * hidden, width, seed=3) * width**-0.5).float(),
        (noise(num_experts, width, hidden, seed=4) * hidden**-0.5).float(),
    ]


def results(
    op: Callable[..., Tensor], index_NS: Tensor, leaves: list[Tensor], grad_ND: Tensor
) -> list[Tensor]:
    x_ND, weight_NS, *weights = own = [x.detach().clone().requires_grad_() for x in leaves]
    y_ND = op(x_ND, index_NS, weight_NS, *weights)
    return [y_ND.detach(), *torch.autograd.grad(y_ND, own, grad_ND.to(y_ND.dtype))]


def case(name: str) -> tuple[Tensor, list[Tensor], Tensor]:
    tokens, selected, num_experts, num_zero, width, hidden = SHAPES[name]
    index_NS = routed(tokens, selected, num_experts + num_zero)
    leaves = leaves_of(tokens, selected, num_experts, width, hidden)
    return index_NS, leaves, noise(tokens, width, seed=5).bfloat16()


def exact(index_NS: Tensor, leaves: list[Tensor], grad_ND: Tensor) -> list[Tensor]:
    """In fp64, from weights rounded as the kernel rounds them."""
    x_ND, weight_NS, *weights = leaves
    rounded = [x_ND.double(), weight_NS.double(), *(w.bfloat16().double() for w in weights)]
    return results(experts_naive, index_NS, rounded, grad_ND)


def assert_near(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.shape == b.shape, name
        error = float((a.double() - b).norm())
        assert error <= tolerance * float(b.norm()), f"{name} is off by {error / b.norm():.3g}"


@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_are_near_exact(name: str) -> None:
    index_NS, leaves, grad_ND = case(name)
    got = results(experts_native, index_NS, leaves, grad_ND)
    assert_near(got, exact(index_NS, leaves, grad_ND), 8e-3)
    assert [x.dtype for x in got] == [torch.bfloat16, torch.bfloat16, *3 * [torch.float32]]


@pytest.mark.parametrize("rows", [15, 16, 17, 32, 33, 192, 193, 700])
def test_all_tokens_to_one_expert(rows: int) -> None:
    index_NS = torch.full((rows, 1), 2)
    leaves, grad_ND = leaves_of(rows, 1, 5, 64, 32), noise(rows, 64, seed=5).bfloat16()
    got = results(experts_native, index_NS, leaves, grad_ND)
    assert_near(got, exact(index_NS, leaves, grad_ND), 8e-3)
    for grad in got[3:]:
        assert not grad[[0, 1, 3, 4]].any(), "an expert without tokens has a gradient"


@pytest.mark.parametrize("name", ["ragged", "many_rows"])
def test_threads_and_runs_change_no_bit(name: str) -> None:
    index_NS, leaves, grad_ND = case(name)
    once = results(experts_native, index_NS, leaves, grad_ND)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        again = results(experts_native, index_NS, leaves, grad_ND)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True)), threads


def test_a_token_does_not_depend_on_the_others() -> None:
    index_NS, leaves, _ = case("ragged")
    x_ND, weight_NS, w_gate_up, w_down = leaves
    whole = experts_native(x_ND, index_NS, weight_NS, w_gate_up, w_down)
    some = slice(20, 41)
    part = experts_native(x_ND[some], index_NS[some], weight_NS[some], w_gate_up, w_down)
    assert torch.equal(part, whole[some])


def test_without_gradients_the_values_are_the_same() -> None:
    index_NS, leaves, grad_ND = case("wide")
    x_ND, weight_NS, w_gate_up, w_down = leaves
    value = results(experts_native, index_NS, leaves, grad_ND)[0]
    with torch.no_grad():
        x_ND = x_ND.requires_grad_()
        assert torch.equal(experts_native(x_ND, index_NS, weight_NS, w_gate_up, w_down), value)


@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_alone_is_the_same(wanted: int) -> None:
    index_NS, leaves, grad_ND = case("ragged")
    all_of_them = results(experts_native, index_NS, leaves, grad_ND)
    leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(leaves)]
    x_ND, weight_NS, w_gate_up, w_down = leaves
    y_ND = experts_native(x_ND, index_NS, weight_NS, w_gate_up, w_down)
    (grad,) = torch.autograd.grad(y_ND, leaves[wanted], grad_ND)
    assert torch.equal(grad, all_of_them[1 + wanted])


def test_recomputed_in_the_backward_it_is_the_same() -> None:
    index_NS, leaves, grad_ND = case("ragged")

    def recomputed(*inputs: Tensor) -> Tensor:
        y = checkpoint(experts_native, *inputs, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y

    plain = results(experts_native, index_NS, leaves, grad_ND)
    again = results(recomputed, index_NS, leaves, grad_ND)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_weights_in_bf16() -> None:
    index_NS, leaves, grad_ND = case("ragged")
    rounded = [*leaves[:2], *(w.bfloat16() for w in leaves[2:])]
    got = results(experts_native, index_NS, rounded, grad_ND)
    want = results(experts_native, index_NS, leaves, grad_ND)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, want, strict=True))


def test_inputs_may_be_strided() -> None:
    index_NS, leaves, grad_ND = case("ragged")
    want = results(experts_native, index_NS, leaves, grad_ND)[0]
    x, weight, w_gate_up, w_down = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in leaves)
    assert torch.equal(experts(x, index_NS.T.contiguous().T, weight, w_gate_up, w_down), want)


def test_what_the_kernel_does_not_take_is_refused() -> None:
    index_NS, (x_ND, weight_NS, w_gate_up, w_down), _ = case("ragged")
    with pytest.raises(ValueError, match=r"float32; use segments"):
        experts_native(x_ND.float(), index_NS, weight_NS, w_gate_up, w_down)
    narrow = (w_gate_up[:, :48].contiguous(), w_down[..., :24].contiguous())
    with pytest.raises(ValueError, match="multiples of 32"):
        experts_native(x_ND, index_NS, weight_NS, *narrow)
