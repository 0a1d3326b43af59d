"""Muon against torch.optim.Muon, against formulas in fp64, and stacked against one at a time."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.optim.orthogonal import polar_express
from moebius.optim.rules import Slot, State
from moebius.optim.rules import muon as muon_file
from moebius.optim.rules.muon import Muon

LR, DECAY = 0.02, 0.1


def run(rule: Muon, params: list[Tensor], blocks: list[int], num_steps: int) -> list[State]:
    """Take seeded steps in place; the gradients depend on shapes and dtype only."""
    slots = [Slot(f"w{i}", "matrix", b) for i, b in enumerate(blocks)]
    states = rule.init(slots, params)
    generator = torch.Generator().manual_seed(7)
    for step in range(1, num_steps + 1):
        grads = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in params]
        rule.update(
            slots, params, grads, states, lr=LR, weight_decay=DECAY, step=step, total_steps=100
        )
    return states


def one_update(
    rule: Muon, weight: Tensor, grad: Tensor, blocks: int = 1, decay: float = 0.0
) -> Tensor:
    """The change of a copy of `weight` after a first step at lr 1."""
    slots, param = [Slot("w", "matrix", blocks)], weight.clone()
    rule.update(
        slots,
        [param],
        [grad],
        rule.init(slots, [param]),
        lr=1.0,
        weight_decay=decay,
        step=1,
        total_steps=100,
    )
    return param - weight


def polar(matrix: Tensor) -> Tensor:
    """The exactly orthogonal factor, from the singular value decomposition."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def quintic(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz through singular values, an independent way to the same polynomial."""
    u, s, vh = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize(
    ("scale", "theirs"), [("match_rms", "match_rms_adamw"), ("original", "original")]
)
@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_equals_torch(shape: tuple[int, int], scale: Any, theirs: str, compute: Any) -> None:
    """torch computes Newton-Schulz in bf16, so the paths agree to bf16's precision."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, other = start.clone(), torch.nn.Parameter(start.clone())
    rule = Muon(coefficients="quintic", scale=scale, compute=compute)
    oracle = torch.optim.Muon([other], lr=LR, weight_decay=DECAY, adjust_lr_fn=theirs)
    generator = torch.Generator().manual_seed(7)
    run(rule, [ours], [1], 20)
    for _ in range(20):
        other.grad = torch.randn(shape, generator=generator)
        oracle.step()
    moved = (other.detach() - start).norm()
    assert (ours - other.detach()).norm() < 0.02 * moved


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_equals_the_formula_in_fp64(shape: tuple[int, int], nesterov: bool) -> None:
    torch.manual_seed(0)
    ours = torch.randn(shape, dtype=torch.float64)
    weight, momentum = ours.clone(), torch.zeros_like(ours)
    run(Muon(coefficients="quintic", scale="spectral", nesterov=nesterov), [ours], [1], 20)
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        grad = torch.randn(shape, dtype=torch.float64, generator=generator)
        momentum = 0.95 * momentum + 0.05 * grad
        direction = 0.95 * momentum + 0.05 * grad if nesterov else momentum
        update = math.sqrt(shape[0] / shape[1]) * quintic(direction)
        weight = weight - LR * DECAY * weight - LR * update
    torch.testing.assert_close(ours, weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("piece", [1, 300, 1 << 20])
@pytest.mark.parametrize(
    "rule", [Muon(compute="fp32"), Muon(normalise="normuon", cautious=True, compute="fp32")]
)
def test_a_stack_equals_one_matrix_at_a_time(
    rule: Muon, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(7)
    stack, alone = torch.randn(5, 8, 12), torch.randn(8, 12)
    grads = torch.randn(5, 8, 12, generator=generator), torch.randn(8, 12, generator=generator)
    want = [
        one_update(rule, weight, grad, decay=0.1)
        for weight, grad in [*zip(stack, grads[0], strict=True), (alone, grads[1])]
    ]
    monkeypatch.setattr(muon_file, "PIECE", piece)
    slots, params = [Slot("a", "expert"), Slot("b", "matrix")], [stack.clone(), alone.clone()]
    states = rule.init(slots, params)
    rule.update(
        slots, params, list(grads), states, lr=1.0, weight_decay=0.1, step=1, total_steps=100
    )
    torch.testing.assert_close(params[0] - stack, torch.stack(want[:5]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(params[1] - alone, want[5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 10), (3, 16, 10)])
def test_blocks_equal_splitting_by_hand(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    rule = Muon(normalise="normuon", compute="fp32")
    weight, grad = torch.randn(shape), torch.randn(shape)
    halves = zip(weight.chunk(2, -2), grad.chunk(2, -2), strict=True)
    want = torch.cat([one_update(rule, w, g) for w, g in halves], dim=-2)
    torch.testing.assert_close(one_update(rule, weight, grad, blocks=2), want, rtol=1e-4, atol=1e-5)
    assert (one_update(rule, weight, grad) - want).norm() > 0.1 * want.norm()


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("coefficients", "low", "high"), [("polar_express", 0.8, 1.2), ("quintic", 0.6, 1.2)]
)
def test_singular_values_are_near_one(
    coefficients: Any, low: float, high: float, compute: Any
) -> None:
    torch.manual_seed(0)
    grad = torch.randn(4, 64, 128)
    rule = Muon(coefficients=coefficients, scale="original", compute=compute)
    values = torch.linalg.svdvals(one_update(rule, torch.zeros(4, 64, 128), grad))
    assert values.min() > low
    assert values.max() < high


@pytest.mark.parametrize("shape", [(3, 48, 96), (3, 96, 48), (3, 64, 64)])
@pytest.mark.parametrize(("steps", "low", "worst"), [(4, 7e-3, 0.21), (5, 3e-3, 0.14)])
def test_low_rank_spectra_end_in_the_published_band(
    shape: tuple[int, int, int], steps: int, low: float, worst: float
) -> None:
    """Singular values over two decades and more, as momenta of trained models have, in bf16."""
    torch.manual_seed(0)
    size = min(shape[1:])
    spectrum = torch.logspace(0, math.log10(low), size)
    left = torch.linalg.qr(torch.randn(shape[0], shape[1], size)).Q
    right = torch.linalg.qr(torch.randn(shape[0], shape[2], size)).Q
    grad = (left * spectrum) @ right.mT
    update = -one_update(Muon(scale="original", steps=steps), torch.zeros(shape), grad)
    update /= math.sqrt(max(1.0, shape[1] / shape[2]))
    # Along each singular direction of the gradient, 1 would be exact.
    gains = (left.mT @ update @ right).diagonal(dim1=-2, dim2=-1)
    assert (gains - 1).abs().max() < worst + 0.03
    assert torch.linalg.svdvals(update).max() < 1 + worst + 0.03


def test_polar_express_sends_the_interval_near_one() -> None:
    """Its polynomials alone, in fp64, on all of the interval that each list is made for."""
    for steps, low, worst in ((4, 3.5e-3, 0.215), (5, 1e-3, 0.15), (7, 1e-3, 0.02)):
        x = torch.logspace(math.log10(low), 0, 10_000, dtype=torch.float64)
        for a, b, c in polar_express(steps):
            x = a * x + b * x**3 + c * x**5
        assert (x - 1).abs().max() < worst


def test_more_steps_converge_to_the_polar_factor() -> None:
    torch.manual_seed(0)
    grad = torch.randn(16, 24, dtype=torch.float64)
    change = one_update(Muon(steps=12, scale="original"), torch.zeros_like(grad), grad)
    torch.testing.assert_close(change, -polar(grad), rtol=0.0, atol=1e-6)


def test_match_rms_gives_an_rms_of_a_fifth() -> None:
    torch.manual_seed(0)
    for shape in ((32, 128), (128, 32)):
        change = one_update(Muon(), torch.zeros(shape), torch.randn(shape))
        assert change.square().mean().sqrt() == pytest.approx(0.2, rel=0.1)


def test_normuon_equals_its_formula() -> None:
    torch.manual_seed(0)
    rule = Muon(normalise="normuon", scale="original", coefficients="quintic", beta2=0.9)
    ours = torch.randn(20, 12, dtype=torch.float64)
    weight, momentum, second = ours.clone(), torch.zeros_like(ours), torch.zeros(20, 1).double()
    run(rule, [ours], [1], 6)
    generator = torch.Generator().manual_seed(7)
    for _ in range(6):
        grad = torch.randn(20, 12, dtype=torch.float64, generator=generator)
        momentum = 0.95 * momentum + 0.05 * grad
        update = quintic(0.95 * momentum + 0.05 * grad)
        second = 0.9 * second + 0.1 * (update**2).mean(1, keepdim=True)
        scaled = update / (second.sqrt() + 1e-7)
        scaled = scaled * update.norm() / scaled.norm()
        weight = weight - LR * DECAY * weight - LR * math.sqrt(20 / 12) * scaled
    torch.testing.assert_close(ours, weight, rtol=1e-9, atol=1e-9)


def test_cautious_decay_only_where_the_update_shrinks() -> None:
    torch.manual_seed(0)
    weight, grad = torch.randn(8, 8), torch.randn(8, 8)
    plain = one_update(Muon(), weight, grad)
    agrees = (-plain * weight >= 0).float()
    assert 0 < agrees.sum() < agrees.numel()
    change = one_update(Muon(cautious=True), weight, grad, decay=0.25)
    torch.testing.assert_close(change, plain - 0.25 * agrees * weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [Muon(), Muon(normalise="normuon"), Muon(cautious=True)])
def test_a_zero_gradient_only_decays(rule: Muon) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 6, 8)
    change = one_update(rule, weight, torch.zeros(3, 6, 8), decay=1e-4)
    torch.testing.assert_close(change, -1e-4 * weight, rtol=1e-2, atol=1e-7)


def test_the_momentum_stays_the_mean_of_the_gradients() -> None:
    """Without Nesterov the direction is the momentum; making it orthogonal must not touch it."""
    weight, grad = torch.zeros(6, 4), 300 * torch.ones(6, 4).bfloat16()
    rule, slots = Muon(nesterov=False), [Slot("w", "matrix")]
    states = rule.init(slots, [weight])
    rule.update(slots, [weight], [grad], states, lr=0.1, weight_decay=0.0, step=1, total_steps=100)
    torch.testing.assert_close(states[0]["momentum"], torch.full((6, 4), 15.0))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"muon needs a matrix.*norm\.weight is \[4\]"):
        Muon().init([Slot("norm.weight", "norm")], [torch.ones(4)])
    with pytest.raises(ValueError, match="gate_up: 6 rows do not divide into 4 blocks"):
        Muon().init([Slot("gate_up", "matrix", 4)], [torch.ones(6, 2)])
    with pytest.raises(ValueError, match="polar_express needs at least 4"):
        Muon(steps=3)
    with pytest.raises(ValueError, match="must lie in"):
        Muon(momentum=1.0)
    with pytest.raises(ValueError, match="eps=0"):
        Muon(eps=0.0)
