"""Experts in a low-precision format against a loop: each expert's segment a product of its own."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from moebius.model.weight import Weight
from moebius.ops.experts import experts, in_use
from moebius.ops.formats import Format, Product, multiply
from moebius.ops.formats.fp8 import FP8
from moebius.ops.formats.mx import MXFP4, MXFP8
from moebius.ops.formats.nvfp4 import NVFP4
from moebius.ops.native import missing
from moebius.ops.swiglu import clamped_swiglu, swiglu

from ..compare import noise

N, D, F, E, S = 70, 40, 24, 6, 2
FORMATS: list[Format] = [FP8(), FP8("e5m2"), MXFP8(), MXFP4(), NVFP4()]
everyone = pytest.mark.parametrize("format", FORMATS, ids=str)
NAMES = ("x", "weight", "gate_up", "down", "b_gate_up", "b_down")


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    shapes = ((N, D), (N, S), (E, 2 * F, D), (E, D, F), (E, 2 * F), (E, D))
    kinds = (dtype, *[wide] * 5)
    sizes = (1.0, 1.0, 0.2, 0.2, 0.1, 0.1)
    return {
        name: noise(*shape, seed=i, dtype=kind) * size
        for i, (name, shape, kind, size) in enumerate(zip(NAMES, shapes, kinds, sizes, strict=True))
    }


def routes() -> Tensor:
    """Experts 0 to 4 are chosen, unevenly; 5 never; 6 and more are zero experts."""
    first = (torch.arange(N) ** 2 // 1300) % 4
    return torch.stack([first, torch.where(torch.arange(N) % 3 == 0, E + 1, first + 1)], dim=1)


def weight_of(x: Tensor, product: Product) -> Weight:
    weight = Weight(tuple(x.shape), "expert")
    weight.data = x.detach().clone()
    weight.product = product
    return weight


def quantised(leaves: dict[str, Tensor], product: Product) -> list[Tensor]:
    gate_up, down = (weight_of(leaves[name], product) for name in ("gate_up", "down"))
    x, weight, b_gate_up, b_down = (
        leaves[name].clone().requires_grad_() for name in NAMES if name not in ("gate_up", "down")
    )
    y = experts(x, routes(), weight, gate_up, down, b_gate_up, b_down)
    y.backward(noise(N, D, seed=9).to(y.dtype))
    grads = [leaf.grad for leaf in (x, weight, gate_up, down, b_gate_up, b_down)]
    assert all(grad is not None for grad in grads)
    return [y.detach(), *(grad for grad in grads if grad is not None)]


def looped(leaves: dict[str, Tensor], product: Product) -> list[Tensor]:
    own = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    index_NS, y = routes(), torch.zeros(N, D, dtype=own["weight"].dtype)
    for expert in range(E):
        token_M, slot_M = (index_NS == expert).nonzero(as_tuple=True)
        x = own["x"][token_M]
        bias = [own[name][expert].to(x.dtype) for name in ("b_gate_up", "b_down")]
        hidden = swiglu(multiply(x, own["gate_up"][expert], product) + bias[0])
        out = multiply(hidden, own["down"][expert], product) + bias[1]
        y = y.index_add(0, token_M, out * own["weight"][token_M, slot_M, None])
    y = y.to(own["x"].dtype)
    grads = torch.autograd.grad(y, [own[name] for name in NAMES], noise(N, D, seed=9).to(y.dtype))
    return [y.detach(), *grads]


@everyone
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backward", ["none", "input", "both"])
def test_experts_equal_a_loop(
    format: Format, dtype: torch.dtype, backward: Literal["none", "input", "both"]
) -> None:
    """The segments' scales are those of the loop: what is left is the order of sums."""
    leaves, product = inputs(dtype), Product(format, backward)
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-13}[dtype]
    pairs = zip(quantised(leaves, product), looped(leaves, product), strict=True)
    for name, (got, want) in zip(("y", *NAMES), pairs, strict=True):
        assert got.dtype == want.dtype, name
        error = float((got.double() - want.double()).norm() / want.double().norm())
        assert error <= tolerance, f"{name} is off by {error:.3g}"


@everyone
def test_experts_are_rounded_at_all(format: Format) -> None:
    leaves = inputs(torch.float32)
    got = quantised(leaves, Product(format))[0]
    gate_up, down, b_gate_up, b_down = (leaves[name] for name in NAMES[2:])
    plain = experts(leaves["x"], routes(), leaves["weight"], gate_up, down, b_gate_up, b_down)
    error = float((got - plain).norm() / plain.norm())
    assert 0.01 < error < 0.5


def test_experts_that_nobody_chose_have_no_gradient_and_no_nan() -> None:
    for format in FORMATS:
        parts = quantised(inputs(torch.float32), Product(format, stochastic=True))
        assert all(part.isfinite().all() for part in parts)
        for grad in parts[3:]:
            assert not grad[5].any() and grad[:4].flatten(1).any(1).all()


def test_no_token_at_all() -> None:
    gate_up, down = (
        weight_of(inputs(torch.float32)[name], Product(NVFP4())) for name in ("gate_up", "down")
    )
    for index in (torch.full((3, S), E), torch.zeros(0, S, dtype=torch.int64)):
        x = noise(len(index), D, dtype=torch.float32).requires_grad_()
        y = experts(x, index, torch.ones(len(index), S), gate_up, down)
        y.sum().backward()
        assert not y.any() and gate_up.grad is not None and not gate_up.grad.any()


def test_another_activation() -> None:
    leaves, seen = inputs(torch.float32), []

    def activation(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return clamped_swiglu(x, 1.7, 7.0)

    gate_up, down = (weight_of(leaves[name], Product(MXFP8())) for name in ("gate_up", "down"))
    arguments = (leaves["x"], routes(), leaves["weight"], gate_up, down)
    one, other = experts(*arguments, activation=activation), experts(*arguments)
    assert len(seen) == 1 and not torch.allclose(one, other)


def test_what_is_in_use_is_named() -> None:
    leaves = inputs(torch.float32)
    down = weight_of(leaves["down"], Product(NVFP4()))
    rounding = "plain" if missing() else "native"
    named = f"quantised (nvfp4, {rounding} rounding)"
    assert in_use(torch.device("cpu"), torch.bfloat16, down) == named
    assert "plain" in in_use(torch.device("cpu"), torch.float64, down)
    with pytest.raises(ValueError, match="in one format"):
        experts(leaves["x"], routes(), leaves["weight"], leaves["gate_up"], down)
