"""Weights that carry their role and their initialisation from the line that declares them.

A weight is born filled with NaN, or `unfilled`, without memory; `initialise` or a `Filling` fills
every one of a model from a seed, in the order of declaration. Roles are the vocabulary that
optimizers speak, and by which `set_products` says which weights are multiplied in a low-precision
format.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextvars import ContextVar
from typing import Literal, Self, final, get_args

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
_MEMORY: ContextVar[str | None] = ContextVar("where weights are declared", default=None)


@contextlib.contextmanager
def unfilled() -> Iterator[None]:
    """Weights that are declared here take no memory until a `Filling` gives them some."""
    token = _MEMORY.set("meta")
    try:
        yield
    finally:
        _MEMORY.reset(token)


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
        return torch.Tensor._make_subclass(
            cls, torch.full(shape, math.nan, device=_MEMORY.get()), True
        )

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

    def holding(self, data: Tensor) -> "Weight":
        """The same weight, with other numbers."""
        twin = torch.Tensor._make_subclass(Weight, data, self.requires_grad)
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, object]) -> "Weight":
        memo[id(self)] = twin = self.holding(copy.deepcopy(self.data, memo))
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
        weight.copy_(_drawn(weight, tuple(weight.shape), generator))


@final
class Filling:
    """Fills the weights of an `unfilled` model some at a time, with what `initialise` would.

    Each is drawn whole, and what `kept(name, whole)` leaves of it is held on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        seed: int,
        device: torch.device,
        kept: Callable[[str, Tensor], Tensor] = lambda _, whole: whole,
    ) -> None:
        self._device, self._kept = device, kept
        self._named = [(name, w, tuple(w.shape)) for name, w in named_weights(model)]
        self._generator = torch.Generator().manual_seed(seed)
        # The stream's state where each weight begins, as far as it was drawn.
        self._states = [self._generator.get_state()]

    def fill(self, some: AbstractSet[Tensor]) -> None:
        """Give some weights memory and their numbers; others wait."""
        for i, (name, weight, _) in enumerate(self._named):
            if weight in some:
                self._hold(weight, self._kept(name, self._whole(i)).to(weight.dtype))

    def leave(self, some: AbstractSet[Tensor]) -> None:
        """Let some have no row, and draw nothing for them."""
        for _, weight, shape in self._named:
            if weight in some:
                self._hold(weight, torch.empty((0, *shape[1:]), dtype=weight.dtype, device="cpu"))

    @torch.no_grad()
    def _hold(self, weight: Weight, data: Tensor) -> None:
        torch.utils.swap_tensors(weight, weight.holding(data.to(self._device)))

    def _whole(self, i: int) -> Tensor:
        for _, weight, shape in self._named[len(self._states) - 1 : i]:
            self._generator.set_state(self._states[-1])
            _drawn(weight, shape, self._generator)
            self._states.append(self._generator.get_state())
        self._generator.set_state(self._states[i])
        _, weight, shape = self._named[i]
        whole = _drawn(weight, shape, self._generator)
        if len(self._states) == i + 1:
            self._states.append(self._generator.get_state())
        return whole


def _drawn(weight: Weight, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The whole of a weight before training, in fp32 on the CPU."""
    if weight.draw is not None:
        return weight.draw(shape, generator)
    if weight.init_std is None:
        return torch.full(shape, weight.constant, device="cpu", dtype=weight.dtype)
    noise = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    return noise * weight.init_std
