"""MinHash: what it estimates, what it finds, and that nothing depends on order or split."""

import random

import numpy as np
import pytest

from moebius.curate.document import Document, Dropped
from moebius.curate.steps.minhash import MinHash, _Bands

from ..driver import run_step

pytest.importorskip("rensa", reason="MinHash signatures are rensa's (the curate extra)")


def words(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghij", k=6)) for _ in range(count)]


def changed(text: list[str], share: float, seed: int) -> list[str]:
    draw = random.Random(seed)
    fresh = words(len(text), seed + 1)
    places = set(draw.sample(range(len(text)), round(share * len(text))))
    return [fresh[i] if i in places else word for i, word in enumerate(text)]


def similarity(one: list[str], other: list[str], length: int) -> float:
    sets = [{tuple(t[i : i + length]) for i in range(len(t) - length + 1)} for t in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1])
def test_signatures_agree_as_much_as_the_texts(share: float) -> None:
    bands = _Bands(MinHash(bands=64, rows=16))
    errors = []
    for seed in range(8):
        one = words(200, seed)
        other = changed(one, share, seed + 100)
        signs = [bands.signature(" ".join(text)) for text in (one, other)]
        assert signs[0] is not None and signs[1] is not None
        errors.append(np.mean(signs[0] == signs[1]) - similarity(one, other, 5))
    # A standard deviation is below 0.016 for one text, 0.006 for the mean.
    assert abs(float(np.mean(errors))) < 0.03


def test_probability_is_that_of_bands() -> None:
    step = MinHash(bands=14, rows=8)
    bands = _Bands(step)
    hits, expected = [], []
    for seed in range(400):
        one = words(100, seed)
        other = changed(one, 0.04, seed + 1000)
        found = [bands.records(Document("d", " ".join(t)), 0, None)["hash"] for t in (one, other)]
        hits.append(len(np.intersect1d(found[0], found[1])) > 0)
        expected.append(1 - (1 - similarity(one, other, 5) ** 8) ** 14)
    spread = np.sqrt(np.sum(np.array(expected) * (1 - np.array(expected)))) / len(expected)
    assert 0.2 < np.mean(expected) < 0.8
    assert abs(np.mean(hits) - np.mean(expected)) < 4 * spread


def corpus() -> list[Document]:
    """Originals, near duplicates, chains of them, exact ones, short ones."""
    texts = []
    for seed in range(20):
        one = words(150, seed)
        texts += [one, changed(one, 0.01, seed + 50), changed(one, 0.4, seed + 80)]
    texts += [texts[0], texts[1], words(4, 1000), words(4, 1000)]
    return [Document(str(i), " ".join(text)) for i, text in enumerate(texts)]


def test_near_duplicates_go_and_others_stay() -> None:
    documents = corpus()
    decisions = run_step(MinHash(), documents)
    kept = {d.key for d in decisions if isinstance(d, Document)}
    assert kept == {str(i) for i in range(60) if i % 3 != 1} | {"62", "63"}
    assert {d.reason for d in decisions if isinstance(d, Dropped)} == {"near duplicate"}


@pytest.mark.parametrize(("shards", "ranges"), [(1, 7), (3, 1), (5, 16)])
def test_splits_change_nothing(shards: int, ranges: int) -> None:
    documents = corpus()
    whole = [isinstance(d, Document) for d in run_step(MinHash(), documents)]
    split = [isinstance(d, Document) for d in run_step(MinHash(), documents, shards, ranges)]
    assert whole == split


def test_order_changes_only_who_is_first() -> None:
    documents = corpus()
    random.Random(0).shuffle(documents)
    decisions = run_step(MinHash(), documents, shards=2)
    kept = {int(d.key) for d in decisions if isinstance(d, Document)}
    groups = {i: i // 3 if i % 3 < 2 else -i for i in range(60)} | {60: 0, 61: 0, 62: -1, 63: -3}
    assert sorted(groups[i] for i in kept) == sorted(set(groups.values()))


def test_case_punctuation_and_digits_do_not_matter() -> None:
    text = words(100, 0)
    other = "Of 12, " + "; ".join(text).upper()
    documents = [Document("a", "of 99 " + " ".join(text)), Document("b", other)]
    assert isinstance(run_step(MinHash(), documents)[1], Dropped)


def test_nothing_below_one() -> None:
    with pytest.raises(ValueError, match="rows must be at least 1"):
        MinHash(rows=0)
