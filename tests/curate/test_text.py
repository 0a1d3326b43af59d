"""Words in every script, and that the fast ways find what the slow one finds."""

import sys
import unicodedata

import regex

from moebius.curate.text import hash_of, hashes_of, normalised, words

UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")


def direct(text: str) -> list[str]:
    """Words by going through the characters."""
    found: list[str] = []
    inside = False
    for i, mark in enumerate(text):
        if UNSPACED.match(mark):
            found.append(mark)
            inside = False
        elif unicodedata.category(mark)[0] in "LMN" or mark == "_":
            if inside:
                found[-1] += mark
            else:
                found.append(mark)
            inside = True
        elif (
            mark in "'\u2019"
            and inside
            and i + 1 < len(text)
            and (unicodedata.category(text[i + 1])[0] in "LMN" or text[i + 1] == "_")
            and not UNSPACED.match(text[i + 1])
        ):
            found[-1] += mark
        else:
            inside = False
    return found


def test_words_are_those_of_a_direct_walk() -> None:
    texts = [
        "Don't stop, it's 4 o'clock 'now'",
        "L\u2019eau \u00e9tait d\u00e9j\u00e0 l\u00e0 \u2014 \u00abbien\u00bb",
        "\u0414\u043e\u0431\u0440\u044b\u0439 \u0434\u0435\u043d\u044c, \u03ba\u03b1\u03bb\u03ae",
        "\u4e1c\u897fabc\u6771 \u304b\u306a\u30ab\u30ca \u0e44\u0e17\u0e22",
        "\u0928\u092e\u0938\u094d\u0924\u0947 \u05e9\u05dc\u05d5\u05dd it\u2019s 'x' _a_ 1.5",
        "",
    ]
    for text in texts:
        assert words(text) == direct(text)


def test_every_character_is_judged_alike() -> None:
    """Each code point between two letters, by the way its text takes."""
    marks = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    old = unicodedata.unidata_version
    wrong = [
        mark
        for mark in marks
        if unicodedata.category(mark) != "Cn"
        and mark not in "'\u2019"
        and words(f"a{mark}b") != direct(f"a{mark}b")
    ]
    # `regex` may know a later Unicode than the standard library.
    assert not [mark for mark in wrong if ord(mark) < 0x2800], old


def test_normalised_text_forgets_case_accents_digits_and_marks() -> None:
    assert normalised("\u00c9b\u00e8ne 12,  OK!\n") == "ebene 00 ok"


def test_hashes_are_stable() -> None:
    assert hash_of("moebius") == int(hashes_of(["moebius"])[0])
    assert hash_of("moebius") != hash_of("moebius", seed=1)
