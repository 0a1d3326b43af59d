"""Densities of sites: equal however the corpus is cut, and equal to adding up by hand."""

import random
from collections import Counter
from pathlib import Path

import pytest

from moebius.curate.addresses import site_of
from moebius.curate.document import Document, Dropped
from moebius.curate.private import find
from moebius.curate.steps.site_density import SiteDensity

from .driver import run_step

CUTS = [(1, 1), (2, 3), (5, 16), (40, 2), (3, 1000)]


@pytest.fixture
def lists(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "eng").write_text("rudeword\nvery bad\n")
    (tmp_path / "deu").write_text("schlimm\n")
    return {"eng": str(tmp_path / "eng"), "deu": str(tmp_path / "deu")}


def pages(seed: int, count: int) -> list[Document]:
    """Pages of sites that differ in what they hold, some without an address."""
    chance = random.Random(seed)
    names = ["good.org", "people.com", "adult.net", "shop.co.uk", "me.github.io", ""]
    found: list[Document] = []
    for row in range(count):
        site = chance.choice(names)
        texts = ["plain"] * chance.randint(0, 30)
        texts += ["a@b.org"] * (chance.randint(0, 3) if site == "people.com" else 0)
        if site in ("adult.net", "me.github.io"):
            texts += ["Rudeword", "very bad", "schlimm"] * chance.randint(0, 2)
        chance.shuffle(texts)
        url = f"http://www.{site}/{row}" if site else ""
        language = chance.choice(["eng", "deu", "fra", ""])
        found.append(Document(f"k{row}", " ".join(texts), url=url, language=language))
    return found


def dirty_of(document: Document) -> int:
    """Adult words of a page, counted without any machinery."""
    text = document.text.casefold()
    english = text.count("rudeword") + text.count("very bad")
    german = text.count("schlimm")
    return {"eng": english, "deu": german, "": max(english, german)}.get(document.language, 0)


def by_hand(step: SiteDensity, documents: list[Document]) -> list[str]:
    """The reason for each document, empty where it is kept."""
    number, length, private, dirty = Counter(), Counter(), Counter(), Counter()
    for document in documents:
        site = site_of(document.url)
        number[site] += 1
        # An e-mail address here is three words.
        length[site] += len(document.text.replace("a@b.org", "a b org").split())
        private[site] += len(find(document.text))
        dirty[site] += dirty_of(document)
    reasons: list[str] = []
    for document in documents:
        site = site_of(document.url)
        reason = ""
        if site and number[site] >= step.min_pages and length[site]:
            if 1000 * private[site] / length[site] > step.max_pii_per_1000_words:
                reason = "site with much private data"
            elif dirty[site] / length[site] > step.max_dirty_share:
                reason = "site with adult words"
        reasons.append(reason)
    return reasons


@pytest.mark.parametrize("seed", range(4))
def test_against_adding_up_by_hand(seed: int, lists: dict[str, str]) -> None:
    step = SiteDensity(lists=lists, max_pii_per_1000_words=30.0, min_pages=7)
    documents = pages(seed, 60)
    wanted = by_hand(step, documents)
    assert {"", "site with much private data", "site with adult words"} == set(wanted)
    runs = [run_step(step, documents, shards, ranges) for shards, ranges in CUTS]
    found = [d.reason if isinstance(d, Dropped) else "" for d in runs[0]]
    assert found == wanted
    assert all(other == runs[0] for other in runs)


def test_few_pages_and_pages_without_an_address_are_kept() -> None:
    full = [Document(str(i), "a@b.org", url=f"http://x.com/{i}") for i in range(4)]
    bare = [Document(f"b{i}", "a@b.org") for i in range(9)]
    prose = [Document(f"p{i}", "a@b.org", url="http://x.com", kind="prose") for i in range(9)]
    assert run_step(SiteDensity(), [*full, *bare, *prose]) == [*full, *bare, *prose]
    fifth = Document("5", "clean", url="https://sub.x.com")
    decisions = run_step(SiteDensity(), [*full, fifth], shards=2)
    assert [isinstance(d, Dropped) for d in decisions] == [True] * 5
    assert isinstance(decisions[4], Dropped)
    assert decisions[4].detail == "x.com: 307.7 in 1000 words"


def test_counts_of_the_step_before_are_taken() -> None:
    masked = [
        Document(str(i), "<EMAIL> or so", url=f"http://x.com/{i}", scores={"pii": 1.0})
        for i in range(5)
    ]
    assert all(isinstance(d, Dropped) for d in run_step(SiteDensity(), masked))


def test_mistakes_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="min_pages"):
        SiteDensity(min_pages=0)
    with pytest.raises(ValueError, match="cannot read"):
        SiteDensity(lists={"eng": str(tmp_path / "absent")}).build()
