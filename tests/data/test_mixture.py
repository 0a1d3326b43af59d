"""Shares hold at every length, places are found at random, spent sources leave."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.data.mixture import Mixture, Pattern

WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@settings(deadline=None)
@given(WEIGHTS, st.integers(1, 400))
def test_no_source_is_ever_a_sequence_away_from_its_share(weights: list[int], n: int) -> None:
    mixture = Mixture([float(weight) for weight in weights], [None] * len(weights))
    counts = [0] * len(weights)
    for i in range(n):
        source, k = mixture.draw(i)
        assert k == counts[source]
        counts[source] += 1
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - Fraction(weight * (i + 1), sum(weights))) < 1
    assert mixture.counts(n) == counts and mixture.total is None


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 10**12))
def test_a_place_far_away_is_found_at_once(weights: list[int], n: int) -> None:
    mixture = Mixture([float(weight) for weight in weights], [None] * len(weights))
    source, k = mixture.draw(n)
    assert mixture.counts(n)[source] == k
    assert mixture.counts(n + 1)[source] == k + 1
    assert sum(mixture.counts(n)) == n


@settings(deadline=None)
@given(WEIGHTS, st.data())
def test_a_pattern_knows_the_place_of_every_occurrence(
    weights: list[int], data: st.DataObject
) -> None:
    pattern = Pattern(weights)
    source = data.draw(st.integers(0, len(weights) - 1))
    occurrence = data.draw(st.integers(0, 200))
    place = pattern.place(source, occurrence)
    assert pattern.source(place) == source and pattern.counts(place)[source] == occurrence


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_spent_sources_leave_and_the_rest_share(data: st.DataObject) -> None:
    weights = data.draw(WEIGHTS)
    caps = st.one_of(st.none(), st.integers(0, 60))
    capacities = data.draw(st.lists(caps, min_size=len(weights), max_size=len(weights)))
    mixture = Mixture([float(weight) for weight in weights], capacities)
    endless = any(cap is None for cap in capacities)
    total = sum(cap or 0 for cap in capacities)
    assert mixture.total == (None if endless else total)
    counts, start, before = [0] * len(weights), 0, [0] * len(weights)
    active = [i for i, cap in enumerate(capacities) if cap != 0]
    for n in range(min(400, total) if not endless else 400):
        source, k = mixture.draw(n)
        assert source in active and k == counts[source]
        counts[source] += 1
        sharing = sum(weights[i] for i in active)
        for i in active:
            share = Fraction(weights[i] * (n + 1 - start), sharing)
            assert abs(counts[i] - before[i] - share) < 1
        if counts[source] == capacities[source]:
            active = [i for i in active if i != source]
            start, before = n + 1, list(counts)


def test_a_number_beyond_the_capped_data_is_refused() -> None:
    mixture = Mixture([1.0, 1.0], [3, 2])
    assert mixture.total == 5 and mixture.counts(5) == [3, 2]
    with pytest.raises(ValueError, match="max_epochs"):
        mixture.draw(5)


def test_decimal_weights_are_exact() -> None:
    mixture = Mixture([0.7, 0.2, 0.1], [None] * 3)
    assert mixture.counts(10**9) == [7 * 10**8, 2 * 10**8, 10**8]


def test_a_source_of_weight_0_never_comes() -> None:
    mixture = Mixture([0.0, 0.5, 0.0, 0.5], [3, None, None, 2])
    assert [mixture.draw(n)[0] for n in range(8)].count(1) == 6
    assert mixture.counts(8) == [0, 6, 0, 2] and mixture.total is None
    assert Mixture([0.0, 1.0], [None, 4]).total == 4
