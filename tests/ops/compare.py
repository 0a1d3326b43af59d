"""Values and gradients of two functions of the same tensors, compared."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# By dtype of the inputs; in bf16 a result is rounded once, its parts more than once.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def with_gradients(
    function: Callable[[Mapping[str, Tensor]], Tensor], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The value of a function, and its gradients in a fixed random direction, by input."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    value = function(leaves)
    direction = noise(*value.shape, seed=99).to(value.dtype)
    (value * direction).sum().backward()
    results = {"value": value.detach()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"{name} gets no gradient"
        assert leaf.grad.dtype == leaf.dtype
        results[name] = leaf.grad
    return results


def assert_same(
    fast: Callable[[Mapping[str, Tensor]], Tensor],
    naive: Callable[[Mapping[str, Tensor]], Tensor],
    inputs: Mapping[str, Tensor],
    tolerance: float,
) -> None:
    """Assert that two functions agree in value and every gradient, relative to the largest."""
    got, want = with_gradients(fast, inputs), with_gradients(naive, inputs)
    for name, reference in want.items():
        assert got[name].dtype == reference.dtype, name
        assert got[name].shape == reference.shape, name
        assert got[name].isfinite().all(), f"{name} is not finite"
        error = float((got[name].double() - reference.double()).abs().max())
        scale = max(1e-3, float(reference.double().abs().max()))
        assert error <= tolerance * scale, f"{name} is off by {error:.3g} of {scale:.3g}"
