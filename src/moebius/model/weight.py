"""Weights that carry their role and their initialisation from the line that declares them.

A weight is born filled with NaN; `initialise` fills every one of a model from a seed, in the order
of declaration. Roles are the vocabulary that optimizers speak, and by which `set_products` says
which weights are multiplied in a low-precision format.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from moebius.config import nearest
from moebius.monitor.tap import observed
from moebius.ops.formats import Product, Watch
from moebius.ops.linear import Operand

# Values of a shape from the stream that fills the model, on the CPU.
Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]
Role = Literal["embedding", "head", "matrix", "expert", "router", "norm", "bias", "scalar"]
# The roles whose products may be in a low-precision format.
PRODUCT_ROLES: tuple[Role, ...] = ("matrix", "expert")


class Weight(Operand):
    """A parameter with a role, and how to fill it: a draw, normal of a given std, or a constant."""

    role: Role
    init_std: float | None
    constant: float
    draw: Draw | None
    # Fused weights hold this many matrices of equal height along dim -2 (gate and up: 2).
    blocks: int
    # Where it stands in its model, once `set_products` has been there.
    place: str = ""

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
        twin.product, twin.place = self.product, self.place
        memo[id(self)] = twin
        return twin

    @property
    def is_matrix(self) -> bool:
        """Whether a matrix product reads it (embedding look-ups, biases, vectors do not count)."""
        return self.ndim >= 2 and self.role not in ("embedding", "bias")

    def watch(self) -> Watch | None:
        observer, place = observed(), self.place
        return None if observer is None else lambda name, x: observer.see(f"{place}/{name}", x)


def named_weights(module: nn.Module) -> Iterator[tuple[str, Weight]]:
    """Every weight once, by its dotted name; a parameter without a role is a ValueError."""
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, Weight):
            raise ValueError(f"{name} has no role; declare it with moebius.model.weight.Weight")
        yield name, parameter


def check_products(products: Mapping[str, Product | None]) -> None:
    """ValueError where a role cannot have products in a low-precision format."""
    roles = get_args(Role)
    for role in products:
        if role not in roles:
            raise ValueError(f"there is no role {role!r}{nearest(role, PRODUCT_ROLES)}")
        if role == "router":
            raise ValueError("the router stays in fp32; leave it out of products")
        if role == "head":
            raise ValueError("the head's loss has no low-precision product; leave head out")
        if role not in PRODUCT_ROLES:
            known = " or ".join(PRODUCT_ROLES)
            raise ValueError(f"a weight of role {role} is in no matrix product; name {known}")


def set_products(module: nn.Module, products: Mapping[str, Product | None]) -> None:
    """Let the weights of each role be multiplied as `products` says; all others are plain."""
    check_products(products)
    for name, weight in named_weights(module):
        weight.product, weight.place = products.get(weight.role), name


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
