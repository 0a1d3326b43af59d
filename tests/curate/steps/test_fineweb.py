"""FineWeb's rules against the plainest count of the same, and beside datatrove."""

import dataclasses
import random

import pytest

from moebius.curate.steps.fineweb import FineWeb
from moebius.curate.text import words

from .peers import agreement, articles, book_parts, needs_data, peer_filter, poor_texts, reason

LONG = "This is a line of over thirty characters, number {}{}"
OFF = FineWeb(
    min_ended_lines=-1.0,
    max_short_lines=2.0,
    max_duplicate_line_characters=2.0,
    max_new_lines_per_word=1e9,
)


def lines(number: int, ended: int) -> str:
    return "\n\n".join(LONG.format(i, "." * (i < ended)) for i in range(number))


def short(number: int) -> str:
    return "".join(f"\nshort {i} of words." for i in range(number))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty text"),
        (" \n\t", "empty text"),
        (lines(100, 13), ""),
        (lines(100, 12), "too few lines end in punctuation"),
        (lines(34, 34) + short(66), ""),
        (lines(33, 33) + short(67), "too many short lines"),
        (lines(5, 5) + "\n" + lines(1, 1), "duplicate lines"),
        # The stops are those of the script.
        ("这一行有标点符号而且足够长长过三十个字所以它不短也没有重复真的是这样。", ""),
        ("These words\n\n\nstand far from those of the same sentence.", ""),
        ("These words\n\n\n\nstand far from those of the same sentence.", "too many new lines"),
    ],
)
def test_each_rule_at_its_threshold(text: str, expected: str) -> None:
    assert reason(FineWeb(), text) == expected


def test_new_lines_equal_the_plain_count() -> None:
    rng = random.Random(4)
    seen: set[bool] = set()
    for _ in range(200):
        parts = rng.choices(["a", "bc", "--", "\n", "d\u2019e", "字字", " ", "\n\n", "x1"], k=60)
        text = "w " + " ".join(parts)
        expected = text.count("\n") > 0.3 * len(words(text))
        step = dataclasses.replace(OFF, max_new_lines_per_word=0.3)
        assert bool(reason(step, text)) == expected, text
        seen.add(expected)
    assert seen == {True, False}


def test_duplicate_characters_equal_the_plain_count() -> None:
    rng = random.Random(5)
    for _ in range(50):
        parts = rng.choices(["one", "two two", "three three three", "four"], k=9)
        text = "\n".join(parts)
        again = [part for i, part in enumerate(parts) if part in parts[:i]]
        share = sum(map(len, again)) / sum(map(len, parts))
        at, above = (
            dataclasses.replace(OFF, max_duplicate_line_characters=most)
            for most in (share, share + 1e-9)
        )
        assert reason(at, text) == "duplicate lines"
        assert reason(above, text) == ""


@needs_data
def test_agrees_with_datatrove() -> None:
    peer = peer_filter("fineweb_quality_filter", "FineWebQualityFilter")
    texts = [*articles(), *book_parts("en", 2000, 3), *poor_texts()]
    assert agreement(FineWeb(), peer(char_duplicates_ratio=0.1), texts) >= 0.98
    assert agreement(FineWeb(max_duplicate_line_characters=0.01), peer(), texts) >= 0.98
