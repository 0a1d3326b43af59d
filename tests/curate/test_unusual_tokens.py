"""Unusual words: equal however the corpus is cut, equal to the formula written out, and useful."""

import math
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from moebius.curate.document import Document, Dropped
from moebius.curate.steps.unusual_tokens import UnusualTokens
from moebius.curate.text import hash_of

from .driver import run_step

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CUTS = [(1, 1), (2, 3), (7, 64), (90, 5), (4, 3000)]


def made_up(seed: int, count: int) -> list[Document]:
    """Documents of two languages, words by Zipf's law; every fifteenth from other words."""
    chance = random.Random(seed)
    found: list[Document] = []
    for row in range(count):
        language = chance.choice(["eng", "deu"])
        size = chance.choice([chance.randint(16, 31), chance.randint(32, 63), 5])
        stem = "x" if row % 15 == 0 else language[0]
        picked = [f"{stem}{int(40 ** chance.random())}" for _ in range(size)]
        found.append(Document(f"k{row}", " ".join(picked), language=language))
    return [*found, Document("empty", " .. ", language="eng")]


def by_formula(step: UnusualTokens, documents: list[Document]) -> set[str]:
    """The keys of the documents that go, with dictionaries and plain sums."""
    corpus: dict[str, Counter[str]] = defaultdict(Counter)
    for document in documents:
        corpus[document.language].update(document.text.replace("..", "").split())
    groups: dict[tuple[str, int], list[tuple[float, str]]] = defaultdict(list)
    for document in documents:
        own = Counter(document.text.replace("..", "").split())
        if not own:
            continue
        counts = corpus[document.language]
        seed = hash_of(document.language)
        order = sorted(counts, key=lambda word: (-counts[word], hash_of(word, seed)))
        kept = set(order[: step.vocabulary])
        total, length = counts.total() + len(kept), own.total()
        divergence = 0.0
        for word, number in own.items():
            q = ((counts[word] if word in kept else 0) + 1) / total
            divergence += number / length * math.log(number / length / q)
        bucket = (document.language, math.floor(math.log2(length)))
        groups[bucket].append((round(divergence, 6), document.key))
    gone: set[str] = set()
    for members in groups.values():
        if len(members) >= step.min_documents:
            values = sorted(value for value, _ in members)
            most = values[math.ceil(len(values) * (1 - step.share)) - 1]
            gone |= {key for value, key in members if value > most}
    return gone


@pytest.mark.parametrize("vocabulary", [10, 1000])
def test_against_the_formula(vocabulary: int) -> None:
    step = UnusualTokens(share=0.06, min_documents=20, vocabulary=vocabulary)
    documents = made_up(1, 180)
    wanted = by_formula(step, documents)
    assert 5 <= len(wanted) <= 12
    runs = [run_step(step, documents, shards, ranges) for shards, ranges in CUTS]
    gone = {d.key for d, v in zip(documents, runs[0], strict=True) if isinstance(v, Dropped)}
    assert gone == wanted
    assert all(other == runs[0] for other in runs)
    assert {v.reason for v in runs[0] if isinstance(v, Dropped)} == {"unusual words"}


def test_small_groups_equal_documents_and_no_documents() -> None:
    few = made_up(2, 50)
    assert run_step(UnusualTokens(), few, shards=3) == few
    same = [Document(str(i), "all of these are the same") for i in range(300)]
    assert run_step(UnusualTokens(), same, shards=3) == same
    empty = [Document(str(i), "...") for i in range(3)]
    assert run_step(UnusualTokens(), empty) == empty
    assert run_step(UnusualTokens(), []) == []


def test_groups_are_compared_apart() -> None:
    documents = made_up(3, 200)
    whole = UnusualTokens(share=0.1, min_documents=25)
    apart = UnusualTokens(share=0.1, min_documents=25, groups=4)
    assert any(isinstance(d, Dropped) for d in run_step(whole, documents))
    assert run_step(apart, documents) == documents


@pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not here")
def test_gibberish_among_pages_of_novels_is_found() -> None:
    """Pages of shuffled letters among pages of novels: all that fit into the share are found."""
    chance = random.Random(0)
    documents: list[Document] = []
    for path in sorted((DATA / "text" / "en").glob("*.txt")):
        found = path.read_text(encoding="utf-8").split()
        pages = [" ".join(found[i : i + 200]) for i in range(0, 6000, 200)]
        documents += [Document(f"{path.stem}{i}", page) for i, page in enumerate(pages)]
    assert len(documents) == 600
    for number in range(6):
        letters = list(documents[number * 90].text)
        chance.shuffle(letters)
        documents.append(Document(f"gibberish {number}", "".join(letters)[:900]))
    decisions = run_step(UnusualTokens(share=0.02, min_documents=5), documents, shards=4)
    kept = [d.key for d in decisions if isinstance(d, Document)]
    assert len(kept) >= 590
    assert not any(key.startswith("gibberish") for key in kept)


def test_mistakes_of_the_user() -> None:
    with pytest.raises(ValueError, match="share"):
        UnusualTokens(share=1.0)
    with pytest.raises(ValueError, match="groups"):
        UnusualTokens(groups=0)
