"""AdamW against torch.optim.AdamW, and the small epsilons it is for."""

from typing import Any

import pytest
import torch
from torch import Tensor

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
        rule.update(
            slots, ours, grads, states, lr=0.01, weight_decay=0.3, step=step, total_steps=100
        )
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
        slots,
        [weight],
        [grad],
        rule.init(slots, [weight]),
        lr=0.1,
        weight_decay=0.0,
        step=1,
        total_steps=100,
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
        rule.update(
            slots, [weight], [given], states, lr=0.1, weight_decay=0.1, step=1, total_steps=100
        )
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
    with pytest.raises(ValueError, match="rounding=kahan is for state_dtype=bf16"):
        AdamW(rounding="kahan")


def steps(rule: AdamW, start: Tensor, grads: Tensor, name: str = "w", decay: float = 0.1) -> Tensor:
    """The weight after a step for each gradient."""
    weight, slots = start.clone(), [Slot(name, "matrix")]
    states = rule.init(slots, [weight])
    for i, grad in enumerate(grads, 1):
        rule.update(
            slots, [weight], [grad], states, lr=0.01, weight_decay=decay, step=i, total_steps=100
        )
    return weight


def test_how_bf16_moments_follow_fp32() -> None:
    """At beta2 = 0.999 a moment that should fade stands still when rounded to the nearest."""
    slots, grad = [Slot("w", "matrix")], torch.full((400,), 0.7)
    means: dict[str, Tensor] = {}
    ways: list[Any] = ["nearest", "stochastic", "kahan"]
    for way in ways:
        rule, weight = AdamW(0.9, 0.999, state_dtype="bf16", rounding=way), torch.zeros(400)
        states = rule.init(slots, [weight])
        for i in range(1, 301):
            given = [grad if i == 1 else torch.zeros(400)]
            rule.update(
                slots, [weight], given, states, lr=0.1, weight_decay=0.0, step=i, total_steps=300
            )
        means[way] = states[0]["second_moment"].float().mean() / (0.7**2 * 0.001)
    faded = 0.999**299
    assert means["nearest"] == pytest.approx(1.0, rel=0.01)
    assert means["stochastic"] == pytest.approx(faded, rel=0.03)
    assert means["kahan"] == pytest.approx(faded, rel=0.005)


@pytest.mark.parametrize(
    ("way", "limit"), [("nearest", 0.01), ("stochastic", 0.01), ("kahan", 1e-4)]
)
def test_bf16_moments_stay_near_fp32(way: Any, limit: float) -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(64, 32), torch.randn(50, 64, 32)
    want = steps(AdamW(), start, grads)
    got = steps(AdamW(state_dtype="bf16", rounding=way), start, grads)
    assert 0 < (got - want).norm() < limit * (want - start).norm()


def test_bf16_moments_take_half_the_memory_and_leave_fp64_alone() -> None:
    params = [torch.zeros(4), torch.zeros(4, dtype=torch.float64)]
    slots = [Slot("a", "norm"), Slot("b", "norm")]
    low, high = AdamW(state_dtype="bf16", rounding="kahan").init(slots, params)
    assert {name: tensor.dtype for name, tensor in low.items()} == dict.fromkeys(
        ("first_moment", "second_moment", "first_moment_lost", "second_moment_lost"),
        torch.bfloat16,
    )
    assert {name: tensor.dtype for name, tensor in high.items()} == dict.fromkeys(
        ("first_moment", "second_moment"), torch.float64
    )


def test_stochastic_bits_depend_on_name_and_step_alone() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(33, 7), torch.randn(5, 33, 7)
    rule = AdamW(state_dtype="bf16", rounding="stochastic")
    first = steps(rule, start, grads)
    torch.manual_seed(1)
    assert torch.equal(steps(rule, start, grads), first)
    assert not torch.equal(steps(rule, start, grads, name="v"), first)


@pytest.mark.parametrize(
    "rule", [AdamW(cautious=True), AdamW(cautious=True, state_dtype="bf16", rounding="kahan")]
)
def test_cautious_decay_equals_its_formula(rule: AdamW) -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(8, 8), torch.randn(20, 8, 8)
    weight = start.double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for i, grad in enumerate(grads.double(), 1):
        first, second = 0.9 * first + 0.1 * grad, 0.95 * second + 0.05 * grad**2
        update = first / (1 - 0.9**i) / (second / (1 - 0.95**i)).sqrt()
        weight = weight - 0.01 * (update + 2.0 * (update * weight >= 0) * weight)
    got = steps(rule, start, grads, decay=2.0)
    torch.testing.assert_close(got, weight.float(), rtol=1e-3, atol=1e-3)
    assert (got - steps(AdamW(), start, grads, decay=2.0)).norm() > 0.1
