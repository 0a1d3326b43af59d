"""AdamW against torch.optim.AdamW, and the small epsilons it is for."""

import pytest
import torch

from moebius.optim.rules import Slot
from moebius.optim.rules.adamw import AdamW

SHAPES = [(5, 7), (3, 4, 6), (9,), ()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    theirs = [torch.nn.Parameter(param.clone()) for param in ours]
    rule = AdamW(beta1=0.8, beta2=0.9, eps=1e-10)
    oracle = torch.optim.AdamW(
        theirs, lr=0.01, betas=(0.8, 0.9), eps=1e-10, weight_decay=0.3, foreach=False
    )
    slots = [Slot(f"w{i}", "matrix") for i in range(len(ours))]
    states = rule.init(slots, ours)
    for step in range(1, 21):
        grads = [torch.randn_like(param) for param in ours]
        rule.update(slots, ours, grads, states, lr=0.01, weight_decay=0.3, step=step)
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        oracle.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=1e-6, atol=1e-6)


def test_tiny_gradients_move_weights_fully() -> None:
    """The first update is lr * sign(g) as long as eps is far below |g|, here 1e-12."""
    weight = torch.zeros(4)
    grad = torch.tensor([1e-12, -1e-12, 1e-12, 0.0])
    slots, rule = [Slot("w", "matrix")], AdamW()
    rule.update(
        slots, [weight], [grad], rule.init(slots, [weight]), lr=0.1, weight_decay=0.0, step=1
    )
    torch.testing.assert_close(weight, torch.tensor([-0.1, 0.1, -0.1, 0.0]), rtol=1e-3, atol=0.0)


def test_gradients_of_any_layout_and_dtype() -> None:
    torch.manual_seed(0)
    grad = torch.randn(6, 4).bfloat16()
    slots, rule = [Slot("w", "matrix")], AdamW()
    results = []
    for given in (grad.float(), grad, grad.t().contiguous().t()):
        weight = torch.ones(6, 4)
        states = rule.init(slots, [weight])
        rule.update(slots, [weight], [given], states, lr=0.1, weight_decay=0.1, step=1)
        results.append(weight)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_state_is_promoted_never_lowered() -> None:
    params = [torch.zeros(2, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    states = AdamW().init([Slot("a", "norm"), Slot("b", "norm")], params)
    assert [state["second_moment"].dtype for state in states] == [torch.float32, torch.float64]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="must lie in"):
        AdamW(beta2=1.0)
    with pytest.raises(ValueError, match="eps=0"):
        AdamW(eps=0.0)
