"""The noise scale against gradients of a known distribution, and the rates that follow from it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebius.optim.noise import expert_lr_multiplier, noise_scale, optimal_lr


def test_noise_scale_inverts_the_expectation() -> None:
    signal, noise = 3.0, 500.0
    small, big = signal + noise / 8, signal + noise / 64
    assert noise_scale(small, big, 8, 64) == pytest.approx((signal, noise))


def test_noise_scale_of_sampled_gradients() -> None:
    """Gradients G + noise of covariance 4 I in 50 dimensions: |G|^2 = 50, tr(Sigma) = 200."""
    generator = torch.Generator().manual_seed(0)
    each = 1 + 2 * torch.randn(4000, 16, 50, generator=generator, dtype=torch.float64)
    small = each.reshape(-1, 4, 50).mean(1).square().sum(-1).mean().item()
    big = each.mean(1).square().sum(-1).mean().item()
    signal, noise = noise_scale(small, big, 4, 16)
    assert signal == pytest.approx(50, rel=0.02)
    assert noise == pytest.approx(200, rel=0.02)


@given(st.floats(1, 1e7), st.floats(1, 1e7), st.integers(1, 256), st.integers(1, 8))
def test_the_multiplier_is_a_ratio_of_best_rates(
    batch: float, noise: float, experts: int, top_k: int
) -> None:
    top_k = min(top_k, experts)
    want = optimal_lr(batch * top_k / experts, noise, 1.0) / optimal_lr(batch, noise, 1.0)
    assert expert_lr_multiplier(batch, noise, experts, top_k) == pytest.approx(want)


def test_published_and_limiting_values() -> None:
    assert expert_lr_multiplier(0.26, 1.0, 16, 1) == pytest.approx(0.31, abs=0.001)
    assert expert_lr_multiplier(1.0, 1.0, 16, 1) == pytest.approx(0.47, abs=0.001)
    assert expert_lr_multiplier(1e-9, 1.0, 64, 8) == pytest.approx(math.sqrt(1 / 8))
    assert expert_lr_multiplier(4.0, 1.0, 16, 1) == pytest.approx(1.0)
    assert expert_lr_multiplier(5.0, 1.0, 8, 8) == pytest.approx(1.0)
    assert optimal_lr(64.0, 64.0, 1e-3) == pytest.approx(1e-3)
    assert optimal_lr(32.0, 64.0, 1e-3) == pytest.approx(optimal_lr(128.0, 64.0, 1e-3))


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="0 < small < big"):
        noise_scale(1.0, 1.0, 8, 8)
    with pytest.raises(ValueError, match="top_k=9"):
        expert_lr_multiplier(1.0, 1.0, 8, 9)
    with pytest.raises(ValueError, match="noise_tokens=0"):
        expert_lr_multiplier(1.0, 0.0, 8, 2)
    with pytest.raises(ValueError, match="batch=-1"):
        optimal_lr(-1.0, 1.0, 1.0)
