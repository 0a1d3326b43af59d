"""Exact deduplication against a set of the texts seen."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.curate.document import Document, Dropped
from moebius.curate.steps.exact_dedup import ExactDedup
from moebius.curate.text import words

from ..driver import run_step

ACCENTS = str.maketrans("é", "e")
TEXTS = ["", "A b.", "a b", "a  b", "a B 1", "a b 2", "é", "e", "...", "\ud800", "c"]


@pytest.mark.parametrize("normalise", [False, True])
@settings(deadline=None, max_examples=40)
@given(
    texts=st.lists(st.sampled_from(TEXTS), max_size=20),
    shards=st.integers(1, 4),
    ranges=st.integers(1, 4),
)
def test_the_first_of_each_text_stays(
    normalise: bool, texts: list[str], shards: int, ranges: int
) -> None:
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    decisions = run_step(ExactDedup(normalise=normalise), documents, shards, ranges)
    seen: set[str] = set()
    for text, document, decision in zip(texts, documents, decisions, strict=True):
        name = " ".join(words(text.lower().translate(ACCENTS))) if normalise else text
        expected = Dropped("exact duplicate") if name and name in seen else document
        seen.add(name)
        assert type(decision) is type(expected)
        if isinstance(decision, Dropped):
            assert decision.reason == "exact duplicate"


def test_pages_are_compared_by_their_bytes() -> None:
    documents = [Document(str(i), "", raw=raw) for i, raw in enumerate([b"a", b"b", b"a"])]
    kept = [isinstance(d, Document) for d in run_step(ExactDedup(), documents)]
    assert kept == [True, True, False]
