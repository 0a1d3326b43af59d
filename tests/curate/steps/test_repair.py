"""Repair of characters: mojibake, control characters, line ends; and what has to stay."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebius.curate.document import Document
from moebius.curate.step import Decide
from moebius.curate.steps.repair import Repair, cleaned

pytest.importorskip("ftfy", reason="needs the curate extra")


@pytest.fixture(scope="module")
def decide() -> Decide:
    return Repair().build()


def repaired(decide: Decide, text: str) -> str:
    decision = decide(Document("a", text))
    assert isinstance(decision, Document)
    return decision.text


CASES = {
    "utf-8 read as windows-1252": (
        "l\u00e2\u20ac\u2122\u00c3\u00a9t\u00c3\u00a9",
        "l\u2019\u00e9t\u00e9",
    ),
    "nul": ("a\0b", "ab"),
    "controls": ("a\x07\x1b[0mb\x81c\x7f", "abc"),
    "a terminal's colours in ASCII": ("a\x1b[31mb\x1b[0m", "ab"),
    "line ends": ("a\r\nb\rc\u2028d\x0ce", "a\nb\nc\nd\ne"),
    "trailing blanks": ("\n\na  \n b\t\n\nc \u00a0\n", "a\n b\n\nc"),
    "composed": ("e\u0301", "\u00e9"),
    "soft hyphen": ("ex\u00adtra\ufeff", "extra"),
    "lone surrogate": ("a\ud800b", "a\ufffdb"),
}


@pytest.mark.parametrize("way", CASES)
def test_repairs(decide: Decide, way: str) -> None:
    broken, mended = CASES[way]
    assert repaired(decide, broken) == mended
    assert Repair().build()(Document("a", broken)) == Document("a", mended, lineage=("repair",))


KEPT = [
    "Plain words.\n\n\tAn indented line.",
    "“Curly quotes” — \u2018and dashes\u2019…",
    "\uff11\uff12\uff13\uff0c全角文字。",
    "if a &lt; b &amp;&amp; c: # &eacute;",
    "Füße, naïve, œuvre, Ελληνικά, русский, 日本語, العربية, हिन्दी, 👩‍👩‍👧",
]


@pytest.mark.parametrize("text", KEPT)
def test_what_is_right_stays(decide: Decide, text: str) -> None:
    document = Document("a", text)
    assert decide(document) is document


@given(st.text())
def test_cleaned_texts_are_clean(text: str) -> None:
    out = cleaned(text)
    assert cleaned(out) == out
    assert unicodedata.is_normalized("NFC", out)
    assert all(c in "\n\t" or unicodedata.category(c) != "Cc" for c in out)
    assert all(line == line.rstrip() for line in out.split("\n"))
    assert out.encode().decode() == out
