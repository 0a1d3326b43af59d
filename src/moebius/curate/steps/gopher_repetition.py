"""Drop documents that repeat themselves: lines, paragraphs and n-grams, Gopher's table A1.

Rae et al. 2021, appendix A1.1. An n-gram counts as duplicate where it has stood before, and each
character once however many duplicates cover it; the most frequent n-gram counts only where it
stands twice. Shares are of all characters of the text; lines are those with text. Where each
character is a word, two (Chinese, Japanese) or four (Thai, Khmer) stand for one word in n.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moebius.curate.document import Document, Dropped
from moebius.curate.step import Decide, Decision, Filter, Kind
from moebius.curate.steps.gopher_quality import characters_per_word
from moebius.curate.text import words

TOP_NGRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))
DUPLICATE_NGRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))


class Repeats(NamedTuple):
    """The n-grams of one n that stand more than once: equal ones together, each in text order."""

    n: int
    starts: np.ndarray  # the index of its first word
    again: np.ndarray  # whether it has stood before


def word_ids(found: list[str]) -> np.ndarray:
    """A number for each word, equal for equal words."""
    table = dict(zip(found, range(len(found)), strict=True))
    return np.fromiter(map(table.__getitem__, found), np.int64, len(found))


def repeats(ids: np.ndarray, ends: np.ndarray, longest: int) -> Iterator[Repeats]:
    """The repeated n-grams of n = 2 to `longest`, until there are none; exact, without hashes.

    An n-gram that stands more than once holds a shorter one that does, so each n looks only at
    the places that n - 1 left. `ids` name the words, from 0 on; an n-gram may not reach over
    `ends`, for each word the index after its line's last word, and words of different lines differ
    in their ids.
    """
    count = np.bincount(ids)
    starts = np.flatnonzero(count[ids] > 1)
    group = ids[starts]
    for n in range(2, longest + 1):
        whole = starts + n <= ends[starts]
        starts = starts[whole]
        if not len(starts):
            return
        key = group[whole] * len(count) + ids[starts + (n - 1)]
        # Stable, so equal keys stay in text order.
        order = np.argsort(key, kind="stable")
        key = key[order]
        first = np.ones(len(key) + 1, bool)
        np.not_equal(key[1:], key[:-1], out=first[1:-1])
        several = ~(first[:-1] & first[1:])
        if not several.any():
            return
        starts, again = starts[order[several]], ~first[:-1][several]
        group = np.cumsum(~again)
        yield Repeats(n, starts, again)


def covered(found: Repeats, num_words: int) -> np.ndarray:
    """Which words stand in an n-gram that has stood before."""
    starts = found.starts[found.again]
    edges = np.bincount(starts, minlength=num_words + 1)
    edges -= np.bincount(starts + found.n, minlength=num_words + 1)
    return np.cumsum(edges[:num_words]) > 0


def most_frequent(found: Repeats, lengths: np.ndarray, space: int = 1) -> int:
    """Characters of the most frequent n-gram, `space` of them between words, times its number."""
    first = np.flatnonzero(~found.again)
    count = np.diff(first, append=len(found.starts))
    starts = found.starts[first[count == count.max()]]
    characters = sum(lengths[starts + i] for i in range(found.n)) + space * (found.n - 1)
    return int(np.max(characters) * count.max())


def _split(text: str, separator: str) -> list[str]:
    parts = (part.strip("\n") for part in text.split(separator))
    return [part for part in parts if part and not part.isspace()]


def duplicates(parts: list[str]) -> tuple[int, int]:
    """How many parts have stood before, and their characters."""
    once = set(parts)
    return len(parts) - len(once), sum(map(len, parts)) - sum(map(len, once))


@dataclasses.dataclass(frozen=True)
class GopherRepetition(Filter):
    """Thresholds of the table; a document above any of them is dropped."""

    kinds: tuple[Kind, ...] = ("web", "prose")
    max_duplicate_lines: float = 0.30
    max_duplicate_paragraphs: float = 0.30
    max_duplicate_line_characters: float = 0.20
    max_duplicate_paragraph_characters: float = 0.20
    top_ngrams: tuple[tuple[int, float], ...] = TOP_NGRAMS
    duplicate_ngrams: tuple[tuple[int, float], ...] = DUPLICATE_NGRAMS

    def __post_init__(self) -> None:
        if any(n < 2 for n, _ in (*self.top_ngrams, *self.duplicate_ngrams)):
            raise ValueError("top_ngrams and duplicate_ngrams take pairs [n, share] of n >= 2")

    def build(self) -> Decide:
        return self._decide

    def _decide(self, document: Document) -> Decision:
        text = document.text
        if not text.strip():
            return Dropped("empty text")
        return self._of_parts(text) or self._of_ngrams(text) or document

    def _of_parts(self, text: str) -> Dropped | None:
        rules = (
            (
                "duplicate paragraphs",
                _split(text.strip(), "\n\n"),
                self.max_duplicate_paragraphs,
                self.max_duplicate_paragraph_characters,
            ),
            (
                "duplicate lines",
                _split(text, "\n"),
                self.max_duplicate_lines,
                self.max_duplicate_line_characters,
            ),
        )
        for reason, parts, most, most_characters in rules:
            number, characters = duplicates(parts)
            if number > most * len(parts) or characters > most_characters * len(text):
                return Dropped(reason, f"{number} of {len(parts)}, {characters} characters")
        return None

    def _of_ngrams(self, text: str) -> Dropped | None:
        found = words(text)
        wide = characters_per_word(found)
        top = {n * wide: share for n, share in self.top_ngrams}
        duplicate = {n * wide: share for n, share in self.duplicate_ngrams}
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        ends = np.full(len(found), len(found))
        for each in repeats(word_ids(found), ends, max((*top, *duplicate), default=0)):
            if each.n in top:
                size = most_frequent(each, lengths, space=int(wide == 1))
                if size > top[each.n] * len(text):
                    return Dropped("one n-gram too often", f"n={each.n}: {size / len(text):.0%}")
            if each.n in duplicate:
                size = int(lengths[covered(each, len(found))].sum())
                if size > duplicate[each.n] * len(text):
                    return Dropped("duplicate n-grams", f"n={each.n}: {size / len(text):.0%}")
        return None
