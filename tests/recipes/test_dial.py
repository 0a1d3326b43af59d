"""The dial: published numbers at published width, their ratios below it."""

import pytest

from moebius.recipes.dial import GRAIN, NANO, SMALL, Dial

WIDTHS = range(64, 2048, 64)


@pytest.mark.parametrize("published", [2304, 6144, 6400])
def test_at_the_published_width_numbers_stay_as_they_are(published: int) -> None:
    dial = Dial(published, published)
    assert [dial.ffn(1408), dial.rank(513), dial.head(80), dial.heads(7, 80)] == [1408, 513, 80, 7]
    assert [dial.kv_heads(8, 80, 80), dial.experts(512), dial.chosen(1)] == [8, 512, 1]


@pytest.mark.parametrize("width", WIDTHS)
def test_below_it_ratios_stay_within_a_grain(width: int) -> None:
    dial = Dial(width, 6144)
    for n in (2048, 12_288, 18_304):
        scaled = n * width / 6144
        assert dial.ffn(n) % GRAIN == 0 and dial.ffn(n) > 0
        assert abs(dial.ffn(n) - scaled) <= max(GRAIN / 2, GRAIN - scaled)
        assert dial.rank(n) % GRAIN == 0 and 0 <= dial.rank(n) - scaled < GRAIN
    total = 64 * 128 * width / 6144
    assert dial.heads(64, 128) % 2 == 0
    assert abs(dial.heads(64, 128) * dial.head(128) - total) <= max(dial.head(128), 128 - total)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("kv_heads", "heads"), [(8, 80), (8, 32), (4, 32), (16, 16), (1, 6)])
def test_key_heads_divide_heads(width: int, kv_heads: int, heads: int) -> None:
    dial = Dial(width, 6144)
    own = dial.heads(heads, 80)
    found = dial.kv_heads(kv_heads, heads, 80)
    assert own % found == 0
    distance = abs(found - own * kv_heads / heads)
    divisors = (n for n in range(1, own + 1) if own % n == 0)
    assert distance == min(abs(n - own * kv_heads / heads) for n in divisors)


def test_rules_in_numbers() -> None:
    nano, small = Dial(NANO, 6144), Dial(SMALL, 6144)
    assert [nano.ffn(12_288), nano.ffn(2048), nano.rank(1536), nano.rank(512)] == [512, 96, 64, 32]
    assert [small.ffn(12_288), small.ffn(2048), small.rank(1536)] == [2048, 352, 256]
    assert [dial.head(128) for dial in (nano, small)] == [32, 64]
    assert [dial.head(80) for dial in (nano, small)] == [32, 64]
    assert [nano.experts(n) for n in (512, 256, 64, 16, 8)] == [64, 32, 16, 16, 8]
    assert [small.experts(n) for n in (512, 256, 64, 16)] == [128, 64, 32, 16]
    assert [nano.chosen(n) for n in (12, 8, 1)] == [6, 4, 1]
    assert [small.chosen(n) for n in (12, 8, 1)] == [12, 8, 1]


@pytest.mark.parametrize("width", [0, 32, 100, 2048, 4096])
def test_widths_off_the_dial_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match="dial"):
        Dial(width, 6144)
