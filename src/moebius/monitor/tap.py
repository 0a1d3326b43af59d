"""Observing is one word: `tap(name, x)` hands a tensor to whoever watches, and costs nothing else.

An observer is set for a block of code by `observing`; names gain the prefixes of the enclosing
`scope`s. Under `silence` (activation recompute) nothing is seen, so that nothing is seen twice.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor


class Observer(ABC):
    """Who watches. Tensors arrive detached; keep what you need, not the tensor."""

    @abstractmethod
    def see(self, name: str, x: Tensor) -> None:
        """A tensor of the forward."""

    @abstractmethod
    def see_gradient(self, name: str, grad: Tensor, index: Tensor) -> None:
        """The gradient of a tapped tensor, with the indices tapped beside it."""


_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)
_prefix: ContextVar[str] = ContextVar("prefix", default="")


def observed() -> Observer | None:
    """Who watches, for what costs something to compute, or is seen only in the backward."""
    return _observer.get()


def tap(name: str, x: Tensor) -> None:
    """Show x to the observer, if there is one."""
    observer = _observer.get()
    if observer is not None:
        observer.see(_prefix.get() + name, x.detach())


def tap_gradient(name: str, x: Tensor, index: Tensor) -> Tensor:
    """Return x; if somebody watches, show them the gradient that reaches it."""
    observer = _observer.get()
    if observer is None or not x.requires_grad:
        return x
    full_name = _prefix.get() + name
    # A view of its own, so that gradients of other uses of x are not seen here.
    watched = x.view_as(x)
    watched.register_hook(lambda grad: observer.see_gradient(full_name, grad.detach(), index))
    return watched


@contextlib.contextmanager
def observing(observer: Observer | None) -> Iterator[None]:
    """Let `observer` see the taps of the enclosed code."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def silence() -> contextlib.AbstractContextManager[None]:
    """Let nobody see the enclosed code: it repeats what was seen before."""
    return observing(None)


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Prefix the names of the enclosed taps with `name/`."""
    token = _prefix.set(f"{_prefix.get()}{name}/")
    try:
        yield
    finally:
        _prefix.reset(token)
