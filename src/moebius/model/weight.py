"""Weights that carry their role and their initialisation from the line that declares them.

A weight is born filled with NaN; `initialise` fills every one of a model from a seed, in the order
of declaration. Roles are the vocabulary that optimizers speak.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Literal, Self

import torch
from torch import Tensor, nn

# Values of a shape from the stream that fills the model, on the CPU.
Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]
Role = Literal["embedding", "head", "matrix", "expert", "router", "norm", "bias", "scalar"]


class Weight(nn.Parameter):
    """A parameter with a role, and how to fill it: a draw, normal of a given std, or a constant."""

    role: Role
    init_std: float | None
    constant: float
    draw: Draw | None
    # Fused weights hold this many matrices of equal height along dim -2 (gate and up: 2).
    blocks: int

    def __new__(
        cls,
        shape: tuple[int, ...],
        role: Role,
        *,
        std: float | None = None,
        constant: float = 0.0,
        draw: Draw | None = None,
        blocks: int = 1,
    ) -> Self:
        if min(shape, default=1) < 1:
            raise ValueError(f"a weight of shape {shape}; every width must be at least 1")
        return torch.Tensor._make_subclass(cls, torch.full(shape, math.nan), True)

    def __init__(
        self,
        shape: tuple[int, ...],
        role: Role,
        *,
        std: float | None = None,
        constant: float = 0.0,
        draw: Draw | None = None,
        blocks: int = 1,
    ) -> None:
        self.role, self.init_std, self.constant, self.blocks = role, std, constant, blocks
        self.draw = draw

    def __deepcopy__(self, memo: dict[int, object]) -> "Weight":
        twin = Weight(
            tuple(self.shape),
            self.role,
            std=self.init_std,
            constant=self.constant,
            draw=self.draw,
            blocks=self.blocks,
        )
        twin.data = copy.deepcopy(self.data, memo)
        twin.requires_grad_(self.requires_grad)
        memo[id(self)] = twin
        return twin

    @property
    def is_matrix(self) -> bool:
        """Whether a matrix product reads it (embedding look-ups, biases, vectors do not count)."""
        return self.ndim >= 2 and self.role not in ("embedding", "bias")


def named_weights(module: nn.Module) -> Iterator[tuple[str, Weight]]:
    """Every weight once, by its dotted name; a parameter without a role is a ValueError."""
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, Weight):
            raise ValueError(f"{name} has no role; declare it with moebius.model.weight.Weight")
        yield name, parameter


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Fill every weight from one seeded CPU stream, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for _, weight in named_weights(module):
        if weight.draw is not None:
            weight.copy_(weight.draw(tuple(weight.shape), generator))
        elif weight.init_std is None:
            weight.fill_(weight.constant)
        else:
            noise = torch.randn(
                weight.shape, generator=generator, device="cpu", dtype=torch.float32
            )
            weight.copy_(noise * weight.init_std)
