"""Gopher's quality rules: each at its threshold, languages, and beside datatrove."""

import unicodedata

import pytest

from moebius.curate.steps.gopher_quality import STOP_WORDS, GopherQuality, characters_per_word
from moebius.curate.text import words

from .peers import (
    DATA,
    agreement,
    articles,
    book_parts,
    needs_data,
    peer_filter,
    poor_texts,
    reason,
)

# Ten words, 44 characters with their spaces, three of them stop words.
TEN = "the river and its banks were that wide last year"
FIFTY = "\n".join([TEN] * 5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "too few words"),
        ("! ? #", "too few words"),
        (FIFTY, ""),
        (FIFTY.removesuffix(" year"), "too few words"),
        ("\n".join([TEN] * 10_001), "too many words"),
        ("the of " * 25 + "a b " * 12, "words too short"),
        ("the of " + "internationalisation " * 60, "words too long"),
        (FIFTY + "#" * 5, ""),
        (FIFTY + "#" * 6, "too many symbols"),
        (FIFTY + " ..." * 6, "too many symbols"),
        (FIFTY + " \u2026" * 6, "too many symbols"),
        ("\n".join([TEN] + ["- " + TEN] * 9), ""),
        ("\n\n".join([TEN] + ["- " + TEN] * 10), "mostly bullet points"),
        ("\n".join([TEN] * 7 + [TEN + "..."] * 3), ""),
        ("\n".join([TEN] * 6 + [TEN + " \u2026 "] * 3), "lines cut off"),
        (FIFTY + " 1234" * 12, ""),
        (FIFTY + " 1234" * 13, "too few words with letters"),
        (FIFTY + " |" * 13, "too few words with letters"),
        ("river and its banks were wide last year " * 7, "too few stop words"),
        ("River AND its banks OF were wide last year " * 7, ""),
    ],
)
def test_each_rule_at_its_threshold(text: str, expected: str) -> None:
    assert reason(GopherQuality(), text) == expected


def test_marks_count_as_words_on_request() -> None:
    text = "\n".join(["'The river - and - its banks, were (that) wide; last year!'"] * 5)
    assert reason(GopherQuality(), text) == ""
    assert reason(GopherQuality(marks_are_words=True), text) == "too few words with letters"


def test_stop_words_are_of_the_language() -> None:
    spanish = "el perro de la casa que ladra en la noche oscura y fría " * 5
    assert reason(GopherQuality(), spanish, "spa") == ""
    assert reason(GopherQuality(), spanish, "eng") == "too few stop words"
    assert reason(GopherQuality(), spanish) == "too few stop words"
    assert reason(GopherQuality(language="spa"), spanish) == ""
    assert reason(GopherQuality(), spanish, "xho") == ""


def test_scripts_without_spaces_have_no_word_length() -> None:
    chinese = "天地玄黄宇宙洪荒日月盈昃辰宿列张" * 5
    assert reason(GopherQuality(), chinese) == reason(GopherQuality(), chinese, "zho") == ""
    assert reason(GopherQuality(), chinese[:49]) == "too few words"
    # One unspaced character among Latin ones makes no such script.
    assert reason(GopherQuality(), "a b c \u4e00 " * 20) == "words too short"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 1),
        ("a b c d", 1),
        ("river", 1),
        ("天地玄黄", 2),
        ("これは本です", 2),
        ("สวัสดี", 4),
        ("天地 and so on", 1),
    ],
)
def test_characters_per_word(text: str, expected: int) -> None:
    assert characters_per_word(words(text)) == expected


@needs_data
@pytest.mark.parametrize("language", sorted(STOP_WORDS))
def test_stop_words_are_in_real_texts(language: str) -> None:
    paths = sorted((DATA / "lang/udhr").glob(f"{language}*.txt"))
    if not paths:
        pytest.skip(f"no text in {language} is here")
    text = unicodedata.normalize("NFC", paths[0].read_text("utf-8"))
    found = set(words(text.casefold()))
    assert len(found.intersection(STOP_WORDS[language].split())) >= 6


@needs_data
def test_books_are_kept() -> None:
    parts = book_parts("en", 3000, 3)
    assert [reason(GopherQuality(), part) for part in parts] == [""] * len(parts)


@needs_data
def test_agrees_with_datatrove() -> None:
    peer = peer_filter("gopher_quality_filter", "GopherQualityFilter")()
    texts = [*articles(), *book_parts("en", 2000, 3), *poor_texts()]
    assert agreement(GopherQuality(marks_are_words=True), peer, texts) >= 0.95
    assert agreement(GopherQuality(min_lettered=0), peer, articles()) < 1
