"""Taps: seen by name when somebody watches, once under recompute, and otherwise nothing at all."""

import pytest
import torch
from torch import Tensor

from moebius.model.recompute import recomputed
from moebius.monitor.tap import Observer, observing, scope, silence, tap, tap_gradient


class Notebook(Observer):
    """Keeps everything it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Tensor]] = []
        self.gradients: list[tuple[str, Tensor, Tensor]] = []

    def see(self, name: str, x: Tensor) -> None:
        self.seen.append((name, x))

    def see_gradient(self, name: str, grad: Tensor, index: Tensor) -> None:
        self.gradients.append((name, grad, index))

    def names(self) -> list[str]:
        return [name for name, _ in self.seen]


def test_nobody_watches() -> None:
    x = torch.ones(3, requires_grad=True)
    tap("x", x)
    assert tap_gradient("x", x, torch.arange(3)) is x


def test_names_carry_the_scopes() -> None:
    notebook, x = Notebook(), torch.ones(1)
    with observing(notebook):
        tap("a", x)
        with scope("layers/0"):
            tap("b", x)
            with scope("moe"):
                tap("c", x)
            tap("d", x)
        tap("e", x)
    tap("f", x)
    assert notebook.names() == ["a", "layers/0/b", "layers/0/moe/c", "layers/0/d", "e"]


def test_observers_and_scopes_end_with_their_block_even_by_an_error() -> None:
    outer, inner, x = Notebook(), Notebook(), torch.ones(1)
    with observing(outer):
        with pytest.raises(RuntimeError), observing(inner), scope("deep"):
            tap("a", x)
            raise RuntimeError
        tap("b", x)
        with silence():
            tap("c", x)
        with observing(None):
            tap("d", x)
        tap("e", x)
    assert (inner.names(), outer.names()) == (["deep/a"], ["b", "e"])


def test_what_is_seen_is_detached() -> None:
    notebook, x = Notebook(), torch.ones(2, requires_grad=True)
    with observing(notebook):
        tap("x", x * 2)
    assert not notebook.seen[0][1].requires_grad
    assert notebook.seen[0][1].tolist() == [2.0, 2.0]


def test_the_gradient_of_this_use_alone_is_seen_and_left_alone() -> None:
    notebook = Notebook()
    x, index = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([4, 5])
    with observing(notebook), scope("layers/3"):
        watched = tap_gradient("score", x * 1.0, index)
    (3 * watched + 10 * x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [13.0, 13.0]
    ((name, grad, seen_index),) = notebook.gradients
    assert name == "layers/3/score" and grad.tolist() == [3.0, 3.0]
    assert seen_index is index and not grad.requires_grad


def test_other_uses_of_the_very_tensor_are_not_seen() -> None:
    notebook, x = Notebook(), torch.ones(2, requires_grad=True)
    with observing(notebook):
        watched = tap_gradient("x", x, torch.arange(2))
    (watched * 2 + x * 5).sum().backward()
    assert [grad.tolist() for _, grad, _ in notebook.gradients] == [[2.0, 2.0]]


def test_without_a_gradient_there_is_nothing_to_watch() -> None:
    notebook, x = Notebook(), torch.ones(2)
    with observing(notebook):
        assert tap_gradient("x", x, torch.arange(2)) is x
        with torch.no_grad():
            y = torch.ones(2, requires_grad=True) * 2
            assert tap_gradient("y", y, torch.arange(2)) is y


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputed_code_is_seen_once(recompute: bool) -> None:
    notebook, runs = Notebook(), []

    def layer(x: Tensor) -> Tensor:
        runs.append(1)
        y = x.sin()
        tap("y", y)
        value, index = y.topk(2)
        return tap_gradient("score", value.exp(), index).square()

    x = torch.tensor([0.1, 0.5, 0.3], requires_grad=True)
    with observing(notebook), scope("layers/0"):
        y = recomputed(layer)(x) if recompute else layer(x)
        assert isinstance(y, Tensor)
        y.sum().backward()
    assert len(runs) == 1 + recompute
    assert notebook.names() == ["layers/0/y"]
    ((name, grad, index),) = notebook.gradients
    assert name == "layers/0/score" and index.tolist() == [1, 2]
    torch.testing.assert_close(grad, 2 * x.detach()[index].sin().exp())
