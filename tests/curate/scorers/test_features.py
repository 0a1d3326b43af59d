"""Hashed n-grams against the rule written out, one n-gram at a time, in whole numbers."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.curate.scorers.features import BASE, MIX, PAIR, excerpt, features, word_hashes

ALL = 1 << 64
OWN = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")
TEXTS = st.text(st.sampled_from("aAbéßİ1_ \n.,'漢字ひไทยကខ🙂\u0301\x00\ud800"), max_size=40)


def words_of(text: str) -> list[str]:
    found: list[str] = []
    inside = False
    for character in text.lower():
        if OWN.match(character):
            found.append(character)
            inside = False
        elif regex.match(r"[\p{L}\p{M}\p{N}_]", character):
            found[-1:] = [found[-1] + character] if inside else [*found[-1:], character]
            inside = True
        else:
            inside = False
    return found


def polynomial(text: str, *, rising: bool) -> int:
    """Words grow to the right as they are read, windows lose on the left: hence two orders."""
    total = 0
    for character in reversed(text) if rising else text:
        total = (total * int(BASE) + ord(character) + 1) % ALL
    return total


def place(value: int, bits: int) -> int:
    return (((value ^ (value >> 32)) * int(MIX)) % ALL) >> (64 - bits)


def by_hand(text: str, bits: int, grams: tuple[int, ...]) -> dict[int, float]:
    words = [polynomial(word, rising=True) for word in words_of(text)]
    pairs = [(a * int(PAIR) + b) % ALL for a, b in itertools.pairwise(words)]
    windows = [
        polynomial(text[i : i + n], rising=False) ^ n
        for n in grams
        for i in range(len(text) - n + 1)
    ]
    half = 1 << (bits - 1)
    values: dict[int, float] = {}
    for hashes, offset in ((words + pairs, 0), (windows, half)):
        counts = Counter(place(value, bits - 1) for value in hashes)
        norm = math.sqrt(sum(math.log1p(count) ** 2 for count in counts.values()))
        values |= {p + offset: math.log1p(count) / norm for p, count in counts.items()}
    return values


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.sampled_from([(), (1,), (2, 3, 4), (1, 5)]))
def test_features_are_those_of_the_rule(text: str, grams: tuple[int, ...]) -> None:
    places, values = features(text, 12, grams)
    expected = by_hand(text, 12, grams)
    assert places.tolist() == sorted(expected)
    assert values.tolist() == pytest.approx([expected[p] for p in sorted(expected)], rel=1e-5)


def test_words_have_one_hash_wherever_they_stand() -> None:
    a, b, c, d, e = word_hashes("Tea, teas and TEA tea").tolist()
    assert a == d == e
    assert len({a, b, c}) == 3


@given(st.text(max_size=60), st.integers(3, 30))
def test_an_excerpt_is_short_and_holds_both_ends(text: str, limit: int) -> None:
    cut = excerpt(text, limit)
    if len(text) <= limit:
        assert cut == text
    else:
        assert len(cut) <= limit + 2
        assert text.startswith(cut[: limit // 3]) and text.endswith(cut[-(limit // 3) :])


@pytest.mark.parametrize(("letter", "words"), [("a", 1), (" ", 0), ("漢", 1), ("\u0301", 1)])
def test_a_line_of_sixteen_megabytes_is_cut_before_it_is_looked_at(letter: str, words: int) -> None:
    places, _ = features(excerpt(letter * (16 << 20), 999), 16, ())
    # One letter over and over, thrice: three long words or many short ones, and their pairs.
    assert len(places) == 2 * words


def test_one_word_may_be_a_hundred_thousand_letters_long() -> None:
    (found,) = word_hashes("ab" * 50_000).tolist()
    assert found == polynomial("ab" * 50_000, rising=True)


def test_no_word_gives_no_hash() -> None:
    assert len(word_hashes(" ,.\n")) == len(word_hashes("")) == 0
    assert word_hashes("x").dtype == np.uint64
