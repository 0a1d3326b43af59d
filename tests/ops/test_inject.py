"""Injected losses: the forward is untouched, the backward adds exactly the loss's gradient."""

import torch
from torch import Tensor

from moebius.ops.inject import inject

from .compare import noise


def parts() -> tuple[Tensor, Tensor]:
    return noise(3, 4, seed=1).requires_grad_(), noise(4, seed=2).requires_grad_()


def auxiliary(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).square().sum() / 7.0


def test_it_adds_exactly_the_gradient_of_the_loss() -> None:
    x, w = parts()
    (x.sin().sum() + auxiliary(x, w)).backward()
    y, v = parts()
    main = inject(y, auxiliary(y, v)).sin().sum()
    assert torch.equal(main, y.sin().sum()), "the reported value must stay the main loss alone"
    main.backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-14, atol=0)
    assert torch.equal(v.grad, w.grad)  # pyright: ignore


def test_it_does_not_depend_on_the_scale_of_the_main_loss() -> None:
    grads: list[Tensor] = []
    for scale in (1.0, 1e-6, 0.0):
        x, w = parts()
        (scale * inject(x.detach(), auxiliary(x, w)).sum()).backward()
        assert w.grad is not None
        grads.append(w.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    assert grads[0].any()


def test_two_uses_of_the_result_add_the_loss_once() -> None:
    x, w = parts()
    auxiliary(x, w).backward()
    y, v = parts()
    out = inject(y.detach(), auxiliary(y, v))
    (out.sum() + 3 * out.square().sum()).backward()
    assert torch.equal(v.grad, w.grad)  # pyright: ignore


def test_two_losses_on_one_tensor_both_count() -> None:
    x, w = parts()
    (auxiliary(x, w) + w.sum()).backward()
    y, v = parts()
    inject(inject(y.detach(), auxiliary(y, v)), v.sum()).sum().backward()
    torch.testing.assert_close(v.grad, w.grad, rtol=1e-14, atol=0)


def test_a_second_backward_counts_again() -> None:
    x, w = parts()
    out = inject(x, auxiliary(x, w)).sum()
    out.backward(retain_graph=True)
    assert w.grad is not None
    once = w.grad.clone()
    out.backward()
    assert torch.equal(w.grad, 2 * once)


def test_nothing_happens_without_gradients() -> None:
    x, w = parts()
    with torch.no_grad():
        out = inject(x, auxiliary(x, w))
    assert out is x


def test_the_result_is_no_alias_that_could_lose_the_loss() -> None:
    """A tensor that needs no gradient itself still carries the loss's."""
    _, w = parts()
    x = noise(3, 4)
    out = inject(x, w.sum())
    assert out.requires_grad and torch.equal(out, x)
    out.sum().backward()
    assert torch.equal(w.grad, torch.ones(4, dtype=torch.float64))  # pyright: ignore


def test_half_precision_carries_a_wide_loss() -> None:
    w = noise(4, dtype=torch.float32).requires_grad_()
    inject(torch.ones(2, dtype=torch.bfloat16), (1e-6 * w).sum()).sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32
    torch.testing.assert_close(w.grad, torch.full((4,), 1e-6), rtol=1e-6, atol=0)
