"""Hashes of words and n-grams against words taken apart one by one."""

import itertools
import unicodedata

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.curate import grams

SPLIT = {"digits_alike": False, "split_apostrophes": True}
JOINED = {"digits_alike": False, "split_apostrophes": False}
ALIKE = {"digits_alike": True, "split_apostrophes": True}

# What tells the rules apart: cases, accents (two ways), ligatures, digits, marks, scripts, signs.
PIECES = ["a", "B", "z", "é", "e\u0301", "ß", "ﬁ", "½", "…", "7", "٣", "\uff14", "'", "\u2019", "_"]
PIECES += [
    " ",
    "\n",
    "\u00ad",
    "\u200b",
    "-",
    "漢",
    "か",
    "が",
    "ก",
    "한",
    "\u0915\u094d",
    "😀",
    "\0",
]
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
ASSIGNED = st.characters(max_codepoint=0x1FFFF, exclude_categories=("Cn", "Co", "Cs"))
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.text(ASSIGNED, max_size=20)
)


def plain_words(text: str, digits_alike: bool, split_apostrophes: bool) -> list[str]:
    """The words as the docstrings say, character by character."""
    words, current = [], ""
    for char in text:
        if not split_apostrophes and char in "'\u2018\u2019\u02bc\uff07":
            continue
        if unicodedata.category(char) == "Cf" or unicodedata.combining(char):
            continue
        hangul = "\uac00" <= char <= "\ud7a3"
        parts = unicodedata.normalize("NFKD", char).casefold()
        parts = char if hangul else unicodedata.normalize("NFKD", parts)
        for part in parts:
            if unicodedata.combining(part):
                continue
            number = unicodedata.decimal(part, None)
            part = part if number is None else "0" if digits_alike else str(number)
            alone = regex.match(UNSPACED, part) is not None
            if alone or unicodedata.category(part)[0] not in "LMN":
                words += [current, part if alone else ""]
                current = ""
            else:
                current += part
    return [word for word in [*words, current] if word]


@pytest.mark.parametrize("options", [SPLIT, JOINED, ALIKE], ids=["split", "joined", "alike"])
@settings(deadline=None)
@given(texts=st.lists(TEXTS, min_size=2, max_size=4))
def test_hashes_are_equal_where_words_are(options: dict[str, bool], texts: list[str]) -> None:
    words = [plain_words(text, **options) for text in texts]
    hashes = [grams.word_hashes(text, **options) for text in texts]
    assert [len(one) for one in hashes] == [len(one) for one in words]
    flat = list(zip(itertools.chain(*words), np.concatenate(hashes).tolist(), strict=True))
    for (word, name), (other, other_name) in itertools.combinations(flat, 2):
        assert (word == other) == (name == other_name), (word, other)


@settings(deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_lines_are_equal_where_their_words_are(texts: list[str]) -> None:
    text = "\n".join([*texts, *texts[::-1], "a b", "b a"])
    words = [plain_words(line, **JOINED) for line in text.split("\n")]
    hashes, lengths = grams.line_hashes(text, **JOINED)
    assert lengths.tolist() == [len(" ".join(line)) for line in words]
    assert len(hashes) == len(words)
    for (one, name), (other, other_name) in itertools.combinations(
        zip(words, hashes.tolist(), strict=True), 2
    ):
        assert (one == other) == (name == other_name)


def test_lines_go_over_blocks() -> None:
    long = "word " * 40_000
    hashes, lengths = grams.line_hashes(f"a\n{long}\n\n{long}b\na", **SPLIT)
    assert lengths.tolist() == [1, len(long) - 1, 0, len(long) + 1, 1]
    assert hashes[0] == hashes[4] and len(set(hashes.tolist())) == 4


@settings(deadline=None)
@given(
    words=st.lists(st.integers(0, 2), max_size=40),
    length=st.integers(1, 20),
    cut=st.integers(0, 40),
)
def test_grams_are_equal_where_runs_are(words: list[int], length: int, cut: int) -> None:
    hashes = np.array([11, 2**63 + 5, 2**64 - 1], np.uint64)[np.array(words, int)]
    found = np.concatenate(
        [grams.gram_hashes(hashes, length), grams.gram_hashes(hashes[cut:], length)]
    ).tolist()
    runs = [
        tuple(one[i : i + length])
        for one in (words, words[cut:])
        for i in range(len(one) - length + 1)
    ]
    assert len(found) == len(runs)
    assert len(set(found)) == len(set(runs)) == len(set(zip(found, runs, strict=True)))


def test_characters_that_are_several_come_apart_for_good() -> None:
    classes, _, several = grams._folds()
    assert several[ord("ß")] == "ss"
    codes = [ord(char) for char in "".join(several.values())]
    assert max(classes[codes]) < grams._SEVERAL


def test_blocks_change_nothing() -> None:
    word = ["alpha", "bêta", "don't", "漢字", "ﬁn", "12"]
    text = " ".join(word[i * i % 6] for i in range(40_000))
    assert len(text) > 2 * grams._BLOCK
    hashes = grams.word_hashes(text, **SPLIT)
    single = {w: grams.word_hashes(w, **SPLIT) for w in word}
    expected = np.concatenate([single[word[i * i % 6]] for i in range(40_000)])
    assert np.array_equal(hashes, expected)
    start = len(hashes) - 7
    found = grams.excerpt(text, start, start + 3, **SPLIT)
    assert np.array_equal(grams.word_hashes(found, **SPLIT), hashes[start : start + 3])


def test_hostile_texts_have_hashes() -> None:
    assert len(grams.word_hashes("x" * (1 << 20), **SPLIT)) == 16
    assert len(grams.word_hashes("\ufdfa" * (1 << 14), **SPLIT)) == 3 * (1 << 14) + 1
    assert len(grams.word_hashes("\ud800 \udfff\U0010ffff", **SPLIT)) == 0
    assert len(grams.word_hashes("", **SPLIT)) == 0


def test_excerpt_is_the_text_of_words() -> None:
    text = "One, two-three: don't\nstop 漢字 here."
    assert grams.excerpt(text, 1, 5, **JOINED) == "two-three: don't\nstop"
    assert grams.excerpt(text, 5, 7, **JOINED) == "漢字"
    assert grams.excerpt(text, 7, 9, **JOINED) == "here."
