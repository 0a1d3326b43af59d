"""Scaled rotary positions against formulas written out in plain Python, pair by pair."""

import math

import pytest
import torch

from moebius.model.rope import Linear, Llama3, NTKAlpha, RopeScaling, YaRN, rotated

WIDTH, BASE = 16, 10_000.0
LIKE = torch.zeros(1, dtype=torch.float64)


def plain(pair: int, base: float = BASE) -> float:
    return base ** (-2 * pair / WIDTH)


def llama3(pair: int) -> float:
    """Llama 3.1's rule by wavelengths: factor 8, low 1, high 4, trained at 64 positions."""
    frequency = plain(pair)
    wavelength = 2 * math.pi / frequency
    if wavelength < 64 / 4:
        return frequency
    if wavelength > 64 / 1:
        return frequency / 8
    smooth = (64 / wavelength - 1) / (4 - 1)
    return (1 - smooth) * frequency / 8 + smooth * frequency


def yarn(pair: int, truncate: bool) -> float:
    """YaRN's ramp between the pairs that turn 32 times and once within 4096 positions."""
    bounds = [
        WIDTH * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(BASE)) for turns in (32, 1)
    ]
    low, high = (math.floor(bounds[0]), math.ceil(bounds[1])) if truncate else bounds
    slow = min(1.0, max(0.0, (pair - low) / (high - low)))
    return plain(pair) * (1 - slow) + plain(pair) / 40 * slow


CASES = [
    (Linear(4.0), lambda pair: plain(pair) / 4),
    (NTKAlpha(1000.0), lambda pair: plain(pair, BASE * 1000 ** (WIDTH / (WIDTH - 2)))),
    (Llama3(8.0, 1.0, 4.0, 64), llama3),
    (YaRN(40.0, 4096), lambda pair: yarn(pair, True)),
    (YaRN(40.0, 4096, truncate=False), lambda pair: yarn(pair, False)),
]


@pytest.mark.parametrize(("scaling", "formula"), CASES)
def test_frequencies(scaling: RopeScaling, formula: object) -> None:
    assert callable(formula)
    want = [formula(pair) for pair in range(WIDTH // 2)]
    got = scaling.frequencies(WIDTH, BASE, LIKE)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_hunyuans_effective_base() -> None:
    """128K instruct: 1e4 with alpha 1000 and heads of 80 is a base of 1.19e7."""
    frequency = float(NTKAlpha(1000.0).frequencies(80, 1e4, LIKE)[1])
    assert frequency ** (-80 / 2) == pytest.approx(1.19e7, rel=0.01)


def test_yarn_sizes_and_scores() -> None:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(40) + 1

    assert YaRN(40.0, 4096).size == pytest.approx(mscale(1))
    assert YaRN(40.0, 4096).score == 1.0
    deepseek = YaRN(40.0, 4096, mscale=0.7, mscale_all_dim=1.0)
    assert deepseek.size == pytest.approx(mscale(0.7) / mscale(1))
    assert deepseek.score == pytest.approx(mscale(1) ** 2)
    assert YaRN(40.0, 4096, attention_factor=1.5).size == 1.5


def test_rotation_turns_each_pair_and_stretches_it() -> None:
    x_BTHR = torch.randn(2, 5, 3, WIDTH, dtype=torch.float64)
    position_BT = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 0, 1, 2]])
    scaling = YaRN(40.0, 4096)
    got = rotated(x_BTHR, position_BT, BASE, scaling)
    for pair in range(WIDTH // 2):
        angle = position_BT[..., None].double() * yarn(pair, True)
        x, y = x_BTHR[..., 2 * pair], x_BTHR[..., 2 * pair + 1]
        want = torch.stack(
            [x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], dim=-1
        )
        turned = got[..., 2 * pair : 2 * pair + 2]
        torch.testing.assert_close(turned, want * scaling.size)
    assert rotated(x_BTHR, position_BT, None, scaling) is x_BTHR
