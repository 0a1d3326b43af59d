"""Gopher's repetition rules against the plainest count of the same, and beside datatrove."""

import dataclasses
import random
from collections import Counter

import pytest

from moebius.curate.steps.gopher_repetition import DUPLICATE_NGRAMS, TOP_NGRAMS, GopherRepetition
from moebius.curate.text import words

from .peers import agreement, articles, book_parts, needs_data, peer_filter, poor_texts, reason

# Only the rules on n-grams.
NGRAMS = GopherRepetition(
    max_duplicate_lines=1.0,
    max_duplicate_paragraphs=1.0,
    max_duplicate_line_characters=1.0,
    max_duplicate_paragraph_characters=1.0,
)


def duplicate_share(text: str, n: int) -> float:
    """Characters of words in an n-gram that stood before, of all characters, word by word."""
    found = words(text)
    seen: set[tuple[str, ...]] = set()
    inside: set[int] = set()
    for start in range(len(found) - n + 1):
        ngram = tuple(found[start : start + n])
        if ngram in seen:
            inside.update(range(start, start + n))
        seen.add(ngram)
    return sum(len(found[i]) for i in inside) / len(text)


def top_share(text: str, n: int) -> float:
    """Characters of the most frequent n-gram, the longest of several, where it is twice there."""
    found = words(text)
    counts = Counter(" ".join(found[i : i + n]) for i in range(len(found) - n + 1))
    most = max(counts.values(), default=0)
    longest = max((len(ngram) for ngram, count in counts.items() if count == most), default=0)
    return longest * most / len(text) if most > 1 else 0.0


def random_texts() -> list[str]:
    rng = random.Random(3)
    vocabulary = ["a", "bee", "sea's", "dée", "e", "фф", "gee", "1", "aitch", "I", "jay", "kay"]
    return [
        " ".join(rng.choices(vocabulary[: rng.randrange(1, 13)], k=rng.randrange(1, 90)))
        for _ in range(60)
    ]


@pytest.mark.parametrize("n", range(2, 11))
def test_ngrams_equal_the_plain_count(n: int) -> None:
    met: set[str] = set()
    for text in random_texts():
        for kind, share in (("duplicate", duplicate_share(text, n)), ("top", top_share(text, n))):
            # Up to its share a text stays, and just above it goes.
            for most, dropped in ((share + 1e-9, False), (share - 1e-9, share > 0)):
                step = dataclasses.replace(
                    NGRAMS,
                    duplicate_ngrams=((n, most),) if kind == "duplicate" else (),
                    top_ngrams=((n, most),) if kind == "top" else (),
                )
                assert bool(reason(step, text)) == dropped, (kind, n, text)
                met.add(f"{kind} {dropped}")
    assert len(met) == 4


def test_one_pass_equals_rule_by_rule() -> None:
    """What one n leaves to the next changes no verdict."""
    for text in [*random_texts(), *(" ".join([t, "x y z", t[:20]]) for t in random_texts())]:
        expected = any(top_share(text, n) > share for n, share in TOP_NGRAMS) or any(
            duplicate_share(text, n) > share for n, share in DUPLICATE_NGRAMS
        )
        assert bool(reason(NGRAMS, text)) == expected, text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty text"),
        (" \n\n ", "empty text"),
        ("one line\nand one", ""),
        # 3 of 10 lines may be there twice, but not 4; blank lines are none.
        ("\n \n".join([*"abcdefg", *"aaa"]), ""),
        ("\n \n".join([*"abcdef", *"aaaa"]), "duplicate lines"),
        # A fifth of the characters.
        ("x" * 80 + "\n" + "yy\nyy\nz" + "z" * 9, ""),
        ("long " * 5 + "\nb\nc\nd\n" + "long " * 5, "duplicate lines"),
        ("\n\n\n".join([*"abcdefg", *"aaa"]), ""),
        ("\n\n\n".join(["a\nb", "c\nd", "a\nb"]), "duplicate paragraphs"),
        ("one two three " * 9, "one n-gram too often"),
        ("hello world", ""),
    ],
)
def test_lines_and_paragraphs(text: str, expected: str) -> None:
    assert reason(GopherRepetition(), text) == expected


def test_characters_stand_for_words_where_there_are_no_spaces() -> None:
    rng = random.Random(2)
    filler = "".join(chr(0x4E00 + rng.randrange(9000)) for _ in range(200))
    # Nine characters are about four words; twenty are ten.
    step = GopherRepetition(top_ngrams=())
    assert reason(step, filler[:9] + filler[100:130] + filler[:9]) == ""
    assert reason(step, filler[:20] + filler[100:180] + filler[:20]) == "duplicate n-grams"
    thai = "".join(chr(0x0E01 + rng.randrange(40)) for _ in range(200))
    assert reason(step, thai[:19] + thai[100:160] + thai[:19]) == ""
    assert reason(step, thai[:40] + thai[40:200] + thai[:40]) == "duplicate n-grams"


def test_a_user_is_told_what_n_may_be() -> None:
    with pytest.raises(ValueError, match="n >= 2"):
        GopherRepetition(duplicate_ngrams=((1, 0.5),))


@needs_data
def test_books_and_articles_are_kept() -> None:
    texts = [*book_parts("en", 6000, 1), *book_parts("es", 6000, 1), *book_parts("zh", 3000, 3)]
    assert [reason(GopherRepetition(), text) for text in texts] == [""] * len(texts)
    assert sum(bool(reason(GopherRepetition(), text)) for text in articles()) <= 3


@needs_data
def test_agrees_with_datatrove() -> None:
    peer = peer_filter("gopher_repetition_filter", "GopherRepetitionFilter")()
    texts = [*articles(), *book_parts("en", 2000, 3), *poor_texts()]
    assert agreement(GopherRepetition(), peer, texts) >= 0.97
