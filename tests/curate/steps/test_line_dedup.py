"""Line deduplication against counting lines in a dictionary."""

import collections
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.curate.document import Document, Dropped
from moebius.curate.steps.line_dedup import LineDedup
from moebius.curate.text import normalised, words

from ..driver import run_step

LINES = ["Share this!", "share THIS", "Page 12 of 30", "Page 1 of 2", "", "---", "ok", "Ok."]
LINES += ["a line of its own", "another line of text", "ünïque wörds hère"]
STEP = LineDedup(max_count=2, min_characters=3, min_words=2)


def deduplicated(step: LineDedup, texts: list[str]) -> list[str | None]:
    """The texts without lines that occur too often; None where too little is left."""
    counts = collections.Counter(normalised(line) for text in texts for line in text.split("\n"))

    def goes(line: str) -> bool:
        plain = normalised(line)
        return len(plain) >= step.min_characters and counts[plain] > step.max_count

    found: list[str | None] = []
    for text in texts:
        lines = text.split("\n")
        left = [line for line in lines if not goes(line)]
        if len(left) == len(lines):
            found.append(text)
        else:
            rest = "\n".join(left).strip("\n")
            found.append(rest if len(words(rest)) >= step.min_words else None)
    return found


@settings(deadline=None, max_examples=40)
@given(
    texts=st.lists(st.lists(st.sampled_from(LINES), max_size=5).map("\n".join), max_size=10),
    shards=st.integers(1, 3),
    ranges=st.integers(1, 3),
)
def test_lines_seen_too_often_go(texts: list[str], shards: int, ranges: int) -> None:
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    decisions = run_step(STEP, documents, shards, ranges)
    found = [None if isinstance(d, Dropped) else d.text for d in decisions]
    assert found == deduplicated(STEP, texts)
    assert {d.reason for d in decisions if isinstance(d, Dropped)} <= {"only repeated lines"}


def test_six_times_may_be_a_seventh_not() -> None:
    texts = [
        f"This line is everywhere.\nBut here is text number {'i' * i}, of words." for i in range(7)
    ]
    six = [Document(str(i), text) for i, text in enumerate(texts[:6])]
    seven = [Document(str(i), text) for i, text in enumerate(texts)]
    assert run_step(LineDedup(), six) == six
    for decision, text in zip(run_step(LineDedup(), seven), texts, strict=True):
        assert isinstance(decision, Document)
        assert decision.text == text.split("\n")[1]
        assert decision.lineage == ("line_dedup",)


def test_all_seven_may_be_of_one_document() -> None:
    own = "What is said here is said once, by me."
    text = "\n".join(["In one document only."] * 7 + [own])
    (decision,) = run_step(LineDedup(), [Document("a", text)])
    assert isinstance(decision, Document) and decision.text == own


def test_buckets_count_on_their_own() -> None:
    texts = ["Everybody has this line.\nAnd five words of its own."] * 40
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    one = dataclasses.replace(STEP, max_count=39)
    assert all(isinstance(d, Dropped) for d in run_step(one, documents))
    many = dataclasses.replace(one, buckets=2)
    assert run_step(many, documents) == documents
    assert run_step(many, documents[::-1], shards=3) == documents[::-1]
    halves = dataclasses.replace(many, max_count=5)
    assert all(isinstance(d, Dropped) for d in run_step(halves, documents))


def test_code_keeps_its_lines() -> None:
    documents = [Document(str(i), "    return None\n", kind="code") for i in range(20)]
    assert run_step(LineDedup(), documents) == documents


def test_counts_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        LineDedup(buckets=0)
