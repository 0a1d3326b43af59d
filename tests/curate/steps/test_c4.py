"""C4's rules: lines removed, pages dropped, and beside datatrove."""

import pytest

from moebius.curate.document import Document
from moebius.curate.steps.c4 import C4, num_sentences

from .peers import (
    agreement,
    articles,
    book_parts,
    changed,
    needs_data,
    peer_filter,
    poor_texts,
    reason,
)

FIVE = "One is here. Two is here! Is three here? Four is here. Five is here."


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("  This line is kept.  ", "This line is kept."),
        ('She said: "It is so."', 'She said: "It is so."'),
        ("\u201cIt is so.\u201d", "\u201cIt is so.\u201d"),
        ("这一行留下来。", "这一行留下来。"),
        ("यह पंक्ति रहती है।", "यह पंक्ति रहती है।"),
        ("No mark at its end", None),
        ("It trails off...", None),
        ("Two words.", None),
        ("是的。", None),
        ("Please enable JavaScript to go on.", None),
        ("This site uses cookies to serve you.", None),
        ("Read our Privacy Policy and go on.", None),
        ("It was shown[12] before[3][edit].[citation needed]", "It was shown before."),
        ("The index[i+1] stays as it is.", "The index[i+1] stays as it is."),
        ("A word of " + "x" * 1001 + " is too long.", None),
        ("A word of " + "x" * 1000 + " is not.", "A word of " + "x" * 1000 + " is not."),
        ("一" * 1500 + "。", "一" * 1500 + "。"),
    ],
)
def test_lines(line: str, kept: str | None) -> None:
    assert changed(C4(), f"{FIVE}\n\n{line}") == (f"{FIVE}\n{kept}" if kept else FIVE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "too few sentences"),
        (FIVE, ""),
        (FIVE.replace(" Five is here.", ""), "too few sentences"),
        (f"{FIVE}\nLorem ipsum dolor sit.", "lorem ipsum"),
        (f"{FIVE}\nLorem ipsum dolor sit", ""),
        (f"{FIVE}\nA function f {{x}} is here.", "curly bracket"),
        (f"{FIVE}\nJavaScript has {{x}} in it.", ""),
        (f"{FIVE}\nfunction f {{x}}", ""),
    ],
)
def test_pages(text: str, expected: str) -> None:
    assert reason(C4(), text) == expected


def test_rules_can_be_switched_off() -> None:
    text = "No mark at its end {x}"
    step = C4(endings=(), min_sentences=0, drop_curly_bracket=False)
    assert changed(step, text) == text
    assert reason(step, " \n") == "too few sentences"


def test_a_document_is_changed_in_its_text_alone() -> None:
    document = Document("a", f"{FIVE}\nmenu", url="u", language="eng")
    decision = C4().build()(document)
    assert decision == Document("a", FIVE, url="u", language="eng", lineage=("c4",))
    assert C4().build()(Document("a", FIVE)) == Document("a", FIVE)


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("One.", 1),
        ("no end", 1),
        ("One. two", 2),
        ("One... Two?! Three.", 3),
        ("It cost 3.14 in v1.2.", 1),
        ('"Is it?" he said.', 2),
        ("(Aside.) And on.", 2),
        ("甲。乙\uff01丙", 3),
        ("Ask at example.org today.", 1),
    ],
)
def test_num_sentences(line: str, number: int) -> None:
    assert num_sentences(line) == number


@needs_data
def test_agrees_with_datatrove() -> None:
    peer = peer_filter("c4_filters", "C4QualityFilter")()
    texts = [*articles(), *book_parts("en", 2000, 3), *poor_texts()]
    assert agreement(C4(endings=(".", "?", "!", '"', "'")), peer, texts) >= 0.98
    assert agreement(C4(), peer, texts) >= 0.95
