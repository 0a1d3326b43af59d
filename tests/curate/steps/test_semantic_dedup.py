"""Semantic deduplication with embeddings made of letters, against a greedy pass over all pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.curate.document import Document, Dropped
from moebius.curate.steps.semantic_dedup import SemanticDedup, too_near

from ..driver import run_step

ENCODER = f"{__name__}:letters"


def letters(text: str) -> np.ndarray:
    """How often each of six letters is there: orthogonal where texts have none in common."""
    return np.array([text.count(letter) for letter in "abcdef"], np.float32)


def greedy(vectors: np.ndarray, threshold: float) -> list[int]:
    """The rows that go, one after another."""
    kept: list[np.ndarray] = []
    gone = []
    for row, vector in enumerate(vectors):
        if any(float(vector @ other) > threshold for other in kept):
            gone.append(row)
        else:
            kept.append(vector)
    return gone


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.floats(0.3, 0.99))
def test_rows_too_near_to_a_kept_one_go(seed: int, count: int, threshold: float) -> None:
    vectors = np.random.default_rng(seed).standard_normal((count, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = too_near(vectors, threshold)
    assert [row for row, _ in found] == greedy(vectors, threshold)
    gone = {row for row, _ in found}
    assert all(kept not in gone and vectors[row] @ vectors[kept] > threshold for row, kept in found)


def test_blocks_change_nothing() -> None:
    vectors = np.random.default_rng(0).standard_normal((1500, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert [row for row, _ in too_near(vectors, 0.97)] == greedy(vectors, 0.97)


TEXTS = ["aab", "aaab", "c", "dd", "baa", "", "cccc", "def", "fed", "aabaab"]


@pytest.mark.parametrize(("clusters", "shards", "ranges"), [(1, 1, 1), (4, 3, 8), (50, 2, 3)])
def test_the_first_of_each_meaning_stays(clusters: int, shards: int, ranges: int) -> None:
    step = SemanticDedup(encoder=ENCODER, clusters=clusters, sample=1.0, threshold=0.999)
    documents = [Document(str(i), text) for i, text in enumerate(TEXTS)]
    decisions = run_step(step, documents, shards, ranges)
    assert [d.text for d in decisions if isinstance(d, Document)] == [*TEXTS[:4], "", "def"]
    assert {d.reason for d in decisions if isinstance(d, Dropped)} == {"same meaning as another"}


def test_clusters_that_keep_all_near_pairs_change_nothing() -> None:
    draw = np.random.default_rng(1)
    texts = ["a" * 40 + "b" * int(n) for n in draw.integers(0, 20, 30)]
    texts += ["d" * 40 + "e" * int(n) for n in draw.integers(0, 20, 30)]
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    one = SemanticDedup(encoder=ENCODER, clusters=1, threshold=0.99)
    two = SemanticDedup(encoder=ENCODER, clusters=2, threshold=0.99, sample=1.0)
    expected = [isinstance(d, Document) for d in run_step(one, documents)]
    assert 2 < sum(expected) < 20
    assert [isinstance(d, Document) for d in run_step(two, documents, shards=3)] == expected


def test_a_sample_of_nothing_is_one_cluster() -> None:
    step = SemanticDedup(encoder=ENCODER, sample=1e-12)
    documents = [Document("a", "ab"), Document("b", "ba")]
    assert [type(d) for d in run_step(step, documents)] == [Document, Dropped]


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match="name an encoder"):
        SemanticDedup()
    with pytest.raises(ValueError, match="no module"):
        SemanticDedup(encoder="nowhere:nothing").build()
