"""The planted near duplicates are what they say, and the benchmark counts them right."""

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from moebius.bench.minhash import Found, _caught, _false, _gain, compare, similarity
from moebius.bench.planted import EDITS, Planted, planted
from moebius.curate.steps.minhash import MinHash

WORDS = 60


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    draw = random.Random(0)
    for name in ("a", "b"):
        words = ("".join(draw.choices("abcdefghij", k=5)) for _ in range(3000))
        (folder / f"{name}.txt").write_text("\n".join(words))
    return folder


def test_copies_differ_as_they_say(books: Path) -> None:
    found = planted(books, 90, WORDS, seed=1)
    assert found == planted(books, 90, WORDS, seed=1)
    assert found != planted(books, 90, WORDS, seed=2)
    texts = {one.source: one.text.split() for one in found if not one.edit}
    assert Counter(one.edit for one in found) == {"": 90, **dict.fromkeys(EDITS, 10)}
    for one in found:
        own, words = texts[one.source], one.text.split()
        kept = sum((Counter(own) & Counter(words)).values())
        if replaced := re.match(r"(\d+)% of words replaced", one.edit):
            assert len(words) == WORDS
            changed = sum(a != b for a, b in zip(own, words, strict=True))
            assert changed == round(int(replaced[1]) / 100 * WORDS)
        elif inserted := re.match(r"(\d+)% inserted", one.edit):
            assert len(words) == WORDS + round(int(inserted[1]) / 100 * WORDS)
            assert kept == WORDS
        else:
            assert kept == len(words) == WORDS
            assert (words == own) == (one.edit in ("", "nothing changed"))


def test_too_few_books_are_refused(books: Path) -> None:
    with pytest.raises(ValueError, match="has 100 pieces of 60 words, not 101"):
        planted(books, 101, WORDS, seed=1)


def test_counts() -> None:
    documents = [
        Planted(0, "", "a"),
        Planted(1, "x", "b"),
        Planted(1, "", "b"),
        Planted(0, "y", ""),
    ]
    found = Found([5, 5, 5, 9], 1.0)
    assert _caught(found, documents) == [True, False]
    assert _caught(found, documents, "y") == [False]
    assert _false(found, documents) == 2
    gain = _gain([True, True, False, True], [True, False, False, False])
    assert gain == pytest.approx({"gain": 0.5, "interval": 1.96 * 0.5 / 2})
    assert similarity(MinHash(shingle=2), "a b c", "B, c d") == pytest.approx(1 / 3)


def test_rows_say_what_was_found(books: Path) -> None:
    pytest.importorskip("rensa", reason="MinHash signatures are rensa's (the curate extra)")
    first, *edits = compare(MinHash(), planted(books, 90, WORDS, seed=0), None, repeats=1)
    assert first["name"] == "moebius" and first["documents_per_second"] > 0
    assert first["false_positives"] == 0
    recalls = {row["name"]: row["recall"] for row in edits}
    assert list(recalls) == list(EDITS)
    assert recalls["nothing changed"] == 1 and recalls["40% of words replaced"] == 0
    assert first["recall"] == pytest.approx(sum(recalls.values()) / len(recalls))
    expected = {row["name"]: row["expected"] for row in edits}
    assert expected["nothing changed"] == 1 and expected["40% of words replaced"] < 0.01


def test_a_python_without_datatrove_is_refused(books: Path, tmp_path: Path) -> None:
    pytest.importorskip("rensa", reason="MinHash signatures are rensa's (the curate extra)")
    with pytest.raises(ValueError, match="cannot be run"):
        compare(MinHash(), planted(books, 9, WORDS, seed=0), tmp_path / "no", repeats=1)
