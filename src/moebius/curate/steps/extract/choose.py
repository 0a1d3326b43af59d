"""Which blocks of a page are its main text.

Trafilatura (Barbaresi, 2021), tuned to precision, says which words belong to the article; a block
is kept where most of its shingles are among them. Then what its rules lose is put back: paragraphs
that stand like the kept ones do; code, formulas and images between kept blocks; and where code or
mathematics is still missing, the smallest part of the page that holds all of both.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate, islice

import regex
import trafilatura
from lxml.html import HtmlElement

from moebius.curate.steps.extract.blocks import BREAKS, Block

_WORD = regex.compile(r"\w+")
# Share of a block's shingles (three words) that must be in the verdict.
_AGREEMENT = 0.7
# Blocks before and after that say how far a block is from the bulk of the text.
_AROUND = 12
# Below this share of the page's unlinked text a verdict is not believed at first.
_LITTLE = 0.2
# What share of the kept text has to stand in one way, and how long another such paragraph is.
_COMMON, _LONG = 0.3, 60
# A block whose letters are in links from this share on is a list of links.
_LINKED = 0.5
# Above these sizes a page is a book or a table, and trafilatura would take minutes.
_MOST_ELEMENTS, _MOST_LETTERS = 50_000, 4 << 20
# What is kept for where it stands, and what is passed over in looking for the text around it.
_WANTED = {"code", "formula", "heading", "image"}
_PASSED = {"caption", "code", "formula", "image", "row"}


def main_text(tree: HtmlElement, blocks: list[Block]) -> list[Block]:
    """The blocks of the main text, in order. The tree is left as it is."""
    if _is_huge(tree, blocks):
        return [block for block in blocks if _readable(block) or _is_lost(block, keep=False)]
    kept = _Verdict(_article(tree, precise=True)).of(blocks)
    everything = sum(len(block.text) for block in blocks if _readable(block))
    if _letters(blocks, kept) < _LITTLE * everything:
        broad = _Verdict(_article(tree, precise=False)).of(blocks)
        if _letters(blocks, broad) > _letters(blocks, kept):
            kept = broad
    _keep_alike(blocks, kept)
    _keep_between(blocks, kept)
    if any(_is_lost(block, keep) for block, keep in zip(blocks, kept, strict=True)):
        _keep_around_code(blocks, kept)
    return [block for block, keep in zip(blocks, kept, strict=True) if keep]


def _is_huge(tree: HtmlElement, blocks: list[Block]) -> bool:
    elements = next(islice(tree.iter(), _MOST_ELEMENTS, None), None)
    return elements is not None or sum(len(block.text) for block in blocks) > _MOST_LETTERS


def _article(tree: HtmlElement, precise: bool) -> str:
    # Without `fast` other extractors have their say; F1 is the same, the time a quarter more.
    text = trafilatura.extract(
        tree,
        fast=True,
        favor_precision=precise,
        favor_recall=not precise,
        include_comments=False,
    )
    return text or ""


def _letters(blocks: list[Block], kept: list[bool]) -> int:
    return sum(len(block.text) for block, keep in zip(blocks, kept, strict=True) if keep)


def _readable(block: Block) -> bool:
    return not block.beside and block.links < _LINKED


def _shingles(words: list[str]) -> list[tuple[str, str, str]]:
    return list(zip(words, words[1:], words[2:], strict=False))


@dataclass(slots=True)
class _Verdict:
    """The words of an extractor's text, each to be spent once: a page repeats its headlines."""

    text: str
    lines: Counter[str] = field(init=False)
    shingles: Counter[tuple[str, str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.lines = Counter(" ".join(_WORD.findall(line)) for line in self.text.split("\n"))
        self.shingles = Counter(_shingles(_WORD.findall(self.text)))

    def of(self, blocks: list[Block]) -> list[bool]:
        """Which blocks the text has; of equal ones those that stand where most of it is."""
        words = [_WORD.findall(block.text) for block in blocks]
        candidate = [self.has(own) for own in words]
        sizes = [len(b.text) * c for b, c in zip(blocks, candidate, strict=True)]
        mass = [0, *accumulate(sizes)]

        def rank(i: int) -> tuple[bool, bool, int, int]:
            near = mass[min(len(blocks), i + _AROUND + 1)] - mass[max(0, i - _AROUND)] - sizes[i]
            return blocks[i].beside, blocks[i].links > _LINKED, -near, i

        kept = [False] * len(blocks)
        for i in sorted((i for i, has in enumerate(candidate) if has), key=rank):
            kept[i] = self.has(words[i])
            if kept[i]:
                self.spend(words[i])
        return kept

    def has(self, words: list[str]) -> bool:
        if len(words) < 4:
            return bool(words) and self.lines[" ".join(words)] > 0
        shingles = _shingles(words)
        return sum(self.shingles[s] > 0 for s in shingles) >= _AGREEMENT * len(shingles)

    def spend(self, words: list[str]) -> None:
        if len(words) < 4:
            self.lines[" ".join(words)] -= 1
        else:
            self.shingles.subtract(_shingles(words))


def _keep_alike(blocks: list[Block], kept: list[bool]) -> None:
    """Keep long paragraphs that stand in the tree like a good part of the kept text does."""
    places = [_place(block.element) for block in blocks]
    share: Counter[tuple[tuple[str, str], ...]] = Counter()
    for block, place, keep in zip(blocks, places, kept, strict=True):
        share[place] += len(block.text) * keep
    enough = max(1.0, _COMMON * share.total())
    seen = {block.text for block, keep in zip(blocks, kept, strict=True) if keep}
    for i, block in enumerate(blocks):
        is_prose = block.kind in ("text", "item") and len(block.text) >= _LONG
        is_alike = is_prose and not block.beside and block.links < 0.3
        if not kept[i] and is_alike and share[places[i]] >= enough and block.text not in seen:
            kept[i] = True
            seen.add(block.text)


def _place(element: HtmlElement | None) -> tuple[tuple[str, str], ...]:
    """The names and classes of the two blocks of the tree that an element is in."""
    found: list[tuple[str, str]] = []
    while element is not None and len(found) < 2:
        if element.tag in BREAKS:
            found.append((element.tag, element.get("class") or ""))
        element = element.getparent()
    return tuple(found)


def _keep_between(blocks: list[Block], kept: list[bool]) -> None:
    """Keep headings, code, formulas and images with kept text before and after, labels aside."""

    def kept_last(order: range) -> list[bool]:
        last, found = False, [False] * len(blocks)
        for i in order:
            found[i] = last
            is_text = blocks[i].kind not in _PASSED
            if is_text and (kept[i] or len(blocks[i].text) >= _LONG):
                last = kept[i]
        return found

    before = kept_last(range(len(blocks)))
    after = kept_last(range(len(blocks) - 1, -1, -1))
    for i, block in enumerate(blocks):
        is_wanted = block.kind in _WANTED or block.images > 0
        if is_wanted and not block.beside and before[i] and after[i]:
            kept[i] = True


def _is_lost(block: Block, keep: bool) -> bool:
    return not keep and not block.beside and (block.kind == "code" or block.formulas > 0)


def _keep_around_code(blocks: list[Block], kept: list[bool]) -> None:
    """Keep the smallest part of the page with all code, formulas and kept text, but its links."""
    wanted = [
        block.element
        for block, keep in zip(blocks, kept, strict=True)
        if (keep and not block.beside) or _is_lost(block, keep)
    ]
    # in document order the first and the last have no common ancestor that the others lack
    above = {wanted[0], *wanted[0].iterancestors()}
    part = next(e for e in (wanted[-1], *wanted[-1].iterancestors()) if e in above)
    inside = set(part.iter())
    for i, block in enumerate(blocks):
        if block.element in inside and (_readable(block) or block.kind == "heading"):
            kept[i] = kept[i] or not block.beside
