"""Lion, AdEMAMix, SOAP and Schedule-Free against well-kept public implementations, in 2-D and 3-D,
and against their equations.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.optim.rules import Rule, Slot, State
from moebius.optim.rules.ademamix import AdEMAMix
from moebius.optim.rules.lion import Lion
from moebius.optim.rules.schedule_free import ScheduleFree
from moebius.optim.rules.soap import SOAP

SHAPES = [(6, 10), (10, 6), (3, 8, 5)]
STEPS, LR = 20, 0.01
PEER = "compares with the public optimizer; pip install moebius[dev]"


def starts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(params: Sequence[Tensor], step: int) -> list[Tensor]:
    """Of shapes and the step alone, with a mean that momenta can see."""
    generator = torch.Generator().manual_seed(step)
    return [0.3 + torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def rate(step: int) -> float:
    """A warm-up of five steps."""
    return LR * min(1.0, step / 5)


def run(
    rule: Rule, params: list[Tensor], *, decay: float, blocks: int = 1, steps: int = STEPS
) -> list[State]:
    slots = [Slot(f"w{i}", "matrix", blocks) for i in range(len(params))]
    states = rule.init(slots, params)
    for step in range(1, steps + 1):
        rule.update(
            slots,
            params,
            gradients(params, step),
            states,
            lr=rate(step),
            weight_decay=decay,
            step=step,
            total_steps=STEPS,
        )
    return states


def run_peer(
    make: Callable[[list[torch.nn.Parameter]], Any], params: list[Tensor], steps: int = STEPS
) -> Any:
    """The same steps by a torch optimizer, on copies that are returned with it."""
    copies = [torch.nn.Parameter(param.clone()) for param in params]
    optimizer: Any = make(copies)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        for param, grad in zip(copies, gradients(params, step), strict=True):
            param.grad = grad
        optimizer.step()
    return optimizer, [param.detach() for param in copies]


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def test_lion_equals_the_public_one() -> None:
    peer = pytest.importorskip("pytorch_optimizer", reason=PEER)
    ours = starts()
    _, theirs = run_peer(
        lambda p: peer.Lion(p, betas=(0.9, 0.99), weight_decay=0.3, weight_decouple=True), ours
    )
    run(Lion(), ours, decay=0.3)
    same(ours, theirs)


def test_ademamix_equals_the_public_one() -> None:
    peer = pytest.importorskip("pytorch_optimizer", reason=PEER)
    ours = starts()
    _, theirs = run_peer(
        lambda p: peer.AdEMAMix(
            p,
            betas=(0.9, 0.99, 0.999),
            alpha=5.0,
            t_alpha_beta3=STEPS,
            eps=1e-8,
            weight_decay=0.3,
            weight_decouple=True,
            foreach=True,
        ),
        ours,
    )
    run(AdEMAMix(beta2=0.99, beta3=0.999, eps=1e-8), ours, decay=0.3)
    same(ours, theirs)


def test_ademamix_rises_as_published() -> None:
    rule = AdEMAMix(warmup=0.5)
    halves = [math.log(0.5) / math.log(beta) for beta in (0.9, rule.settings(10, 80)[1], 0.9999)]
    assert rule.settings(10, 80)[0] == pytest.approx(1.25)
    # The half-life is linear in the step.
    assert halves[1] == pytest.approx(halves[0] + (halves[2] - halves[0]) / 4)
    assert rule.settings(40, 80) == rule.settings(80, 80) == (5.0, 0.9999)
    assert AdEMAMix(warmup=0.0).settings(1, 80) == (5.0, 0.9999)


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize(
    ("most", "shapes"), [(10_000, [(6, 6), (3, 5, 5)]), (8, [(8, 12), (3, 12, 8), (9, 9)])]
)
def test_soap_equals_the_public_one_on_each_matrix(
    frequency: int, most: int, shapes: list[tuple[int, ...]]
) -> None:
    """Its own 3-D weights are one tensor with three preconditioners, not a stack of matrices.

    Only where the first gradient fills a preconditioner: else rounding chooses the basis.
    """
    peer = pytest.importorskip("pytorch_optimizer", reason=PEER)
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(shape, generator=generator).double() for shape in shapes]
    rule = SOAP(frequency=frequency, max_precondition_dim=most)
    slots = [Slot(f"w{i}", "expert") for i in range(len(ours))]
    states = rule.init(slots, ours)
    singles = [torch.nn.Parameter(m.clone()) for w in ours for m in w.view(-1, *w.shape[-2:])]
    optimizer = peer.SOAP(
        singles,
        lr=LR,
        betas=(0.95, 0.95),
        weight_decay=0.0,
        precondition_frequency=frequency,
        max_precondition_dim=most,
        eps=1e-8,
    )
    for step in range(1, STEPS + 1):
        grads = gradients(ours, step)
        flat = [m for g in grads for m in g.view(-1, *g.shape[-2:])]
        for param, grad in zip(singles, flat, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        rule.update(
            slots, ours, grads, states, lr=LR, weight_decay=0.0, step=step, total_steps=STEPS
        )
    same([m for w in ours for m in w.view(-1, *w.shape[-2:])], [p.detach() for p in singles], 1e-4)


def test_soap_treats_blocks_and_experts_as_matrices_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 8, 5, generator=generator)
    rule, slots = SOAP(frequency=2), [Slot("w", "expert", 2)]
    whole, parts = stack.clone(), [m.clone() for m in stack.view(6, 4, 5)]
    states, alone = rule.init(slots, [whole]), rule.init([Slot("v", "matrix")] * 6, parts)
    for step in range(1, 9):
        (grad,) = gradients([whole], step)
        rate_and_step = {"lr": LR, "weight_decay": 0.2, "step": step, "total_steps": STEPS}
        rule.update(slots, [whole], [grad], states, **rate_and_step)
        rule.update(
            [Slot("v", "matrix")] * 6, parts, list(grad.view(6, 4, 5)), alone, **rate_and_step
        )
    torch.testing.assert_close(whole.view(6, 4, 5), torch.stack(parts), rtol=1e-4, atol=1e-5)


def test_soap_without_preconditioners_is_adam_a_step_late() -> None:
    ours = [param.double() for param in starts()]
    run(SOAP(max_precondition_dim=1), ours, decay=0.0)
    for i, start in enumerate(starts()):
        weight, first, second = start.double(), torch.zeros(()), torch.zeros(())
        for n in range(1, STEPS):
            grad = gradients(ours, n + 1)[i]
            first, second = 0.95 * first + 0.05 * grad, 0.95 * second + 0.05 * grad**2
            size = math.sqrt(1 - 0.95**n) / (1 - 0.95**n) * rate(n + 1)
            weight = weight - size * first / (second.sqrt() + 1e-8)
        torch.testing.assert_close(ours[i], weight)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_schedule_free_equals_the_public_one(power: float) -> None:
    peer = pytest.importorskip("schedulefree", reason=PEER)
    ours = starts()

    def make(params: list[torch.nn.Parameter]) -> Any:
        optimizer = peer.AdamWScheduleFreeReference(
            params, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.3, r=power
        )
        optimizer.train()
        return optimizer

    rule = ScheduleFree(beta2=0.99, eps=1e-8, power=power)
    optimizer, theirs = run_peer(make, ours)
    states = run(rule, ours, decay=0.3)
    same(ours, theirs)
    averages = [optimizer.state[param]["x"] for param in optimizer.param_groups[0]["params"]]
    rule.to_evaluation(ours, states)
    same(ours, averages)


def test_schedule_free_refuses_weights_that_are_not_its_averages() -> None:
    rule, params = ScheduleFree(), starts()
    states = run(rule, params, decay=0.1, steps=3)
    rule.to_evaluation(params, states)
    params[0].add_(1)
    with pytest.raises(ValueError, match="is not the average that schedule_free keeps"):
        rule.to_training(params, states)


def directions(rule: Rule, num: int) -> list[tuple[Tensor, Tensor]]:
    """(gradient, update) of `num` steps at rate 1, found where nothing decays."""
    weight, slots = torch.zeros(4, 4, dtype=torch.float64), [Slot("w", "matrix")]
    states, found = rule.init(slots, [weight]), []
    for step in range(1, num + 1):
        before, (grad,) = weight.clone(), gradients([weight], step)
        rule.update(
            slots, [weight], [grad], states, lr=1.0, weight_decay=0.0, step=step, total_steps=9
        )
        found.append((grad, before - weight))
    return found


@pytest.mark.parametrize(
    ("rule", "cautious"),
    [
        (Lion(), Lion(cautious=True)),
        (AdEMAMix(), AdEMAMix(cautious=True)),
        (SOAP(), SOAP(cautious=True)),
    ],
)
def test_cautious_decay_only_where_the_update_shrinks(rule: Rule, cautious: Rule) -> None:
    """w <- w - lr (u + wd 1[u w >= 0] w), with updates u that do not depend on w."""
    start = 3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(5)).double()
    weight, want, slots = start.clone(), start.clone(), [Slot("w", "matrix")]
    states = cautious.init(slots, [weight])
    for step, (grad, update) in enumerate(directions(rule, 5), 1):
        if update.any():
            want = want - 0.1 * (update + 0.5 * (update * want >= 0) * want)
        cautious.update(
            slots, [weight], [grad], states, lr=0.1, weight_decay=0.5, step=step, total_steps=9
        )
    torch.testing.assert_close(weight, want)


def test_bad_settings_are_refused() -> None:
    for make, match in (
        (lambda: Lion(beta2=1.0), "must lie in"),
        (lambda: AdEMAMix(beta1=0.9, beta3=0.5), "beta1=0.9 must lie above 0 and not above"),
        (lambda: AdEMAMix(alpha=-1.0), "must not be negative"),
        (lambda: SOAP(frequency=0), "frequency=0 must be at least 1"),
        (lambda: ScheduleFree(eps=0.0), "eps=0"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    with pytest.raises(ValueError, match=r"soap needs a matrix .*norm is \[4\]"):
        SOAP().init([Slot("norm", "norm")], [torch.ones(4)])
