"""What a text shares with benchmarks: sorted arrays of n-gram hashes, searched in numpy.

Words are compared without case, accents, punctuation, apostrophes and invisible characters. A
hyphen separates words or is not there, and so does the comma of 1,000: texts and items are looked
at both ways, and with words joined that were divided at the end of a line.
"""

import dataclasses
from collections.abc import Sequence
from typing import final

import numpy as np
import regex

from moebius.curate.grams import excerpt, gram_hashes, num_letters, word_hashes

_HYPHEN = "[-\u2010\u2011]"
_AT_LINE_END = regex.compile(rf"(?<=\w){_HYPHEN}[ \t]*\r?\n\s*(?=\w)")
_THOUSANDS = regex.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_INSIDE = regex.compile(rf"(?<=\w){_HYPHEN}(?=\w)")


def _words(text: str) -> np.ndarray:
    return word_hashes(text, digits_alike=False, split_apostrophes=False)


def num_words(text: str) -> int:
    """The words of a text as it stands."""
    return len(_words(text))


@dataclasses.dataclass(frozen=True)
class Reading:
    """A part of an item in one view: its owner's number, its words, and which of them tell much.

    Numbers and single letters do not: `1, 2, 3, ...` is in many texts.
    """

    owner: int
    words: np.ndarray
    telling: np.ndarray

    def grams(self, length: int) -> np.ndarray:
        """The n-grams with a telling word; all of them where none has one."""
        grams = gram_hashes(self.words, length)
        counts = np.cumsum(np.append(0, self.telling))
        tells = counts[length:] > counts[: len(grams)]
        return grams[tells] if tells.any() else grams


def views(text: str) -> list[str]:
    """The text, without hyphens at line ends and commas in numbers, and without all hyphens."""
    joined = _THOUSANDS.sub("", _AT_LINE_END.sub("", text))
    return list(dict.fromkeys([text, joined, _INSIDE.sub("", joined)]))


def readings(owner: int, text: str) -> list[Reading]:
    """Each view of a part of an item."""
    return [
        Reading(owner, _words(view), num_letters(view, split_apostrophes=False) > 1)
        for view in views(text)
    ]


@dataclasses.dataclass(frozen=True)
class Hit:
    """What was found: the owner, and the words of the text that it shares, of one view."""

    owner: int
    start: int
    stop: int
    view: str

    def words(self) -> str:
        """The text that is shared."""
        found = excerpt(
            self.view, self.start, self.stop, digits_alike=False, split_apostrophes=False
        )
        return " ".join(found.split())


@final
class _Sorted:
    """A set of hashes with the first owner of each: 12 bytes a hash.

    A table of 8 to 16 bytes a hash, looked up twice (a Bloom filter), tells most absent ones.
    """

    def __init__(self, hashes: np.ndarray, owners: np.ndarray) -> None:
        self.hashes, first = np.unique(hashes, return_index=True)
        self.owners = owners[first]
        bits = max(10, int(8 * len(self.hashes)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._mask = np.uint64((1 << bits) - 1)
        self._some = np.zeros(1 << bits, bool)
        self._some[self.hashes >> self._shift] = True
        self._some[self.hashes & self._mask] = True

    def find(self, grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the grams are there, and where in the set."""
        likely = np.flatnonzero(self._some[grams >> self._shift])
        likely = likely[self._some[grams[likely] & self._mask]]
        if not len(likely):
            return likely, likely
        index = np.searchsorted(self.hashes, grams[likely])
        index[index == len(self.hashes)] = 0
        found = self.hashes[index] == grams[likely]
        return likely[found], index[found]


@final
class AnyGram:
    """Parts of items by all their telling n-grams: one shared is a hit."""

    def __init__(self, length: int, parts: Sequence[Reading]) -> None:
        self._length = length
        self._set = _Sorted(*_flat([(part.owner, part.grams(length)) for part in parts]))

    def hit(self, words: np.ndarray, view: str) -> Hit | None:
        """The first hit in a text."""
        at, index = self._set.find(gram_hashes(words, self._length))
        if not len(at):
            return None
        start = int(at[0])
        return Hit(int(self._set.owners[index[0]]), start, start + self._length, view)


@final
class WholePart:
    """Parts that must be there from their first word to the last, found by their first words."""

    def __init__(self, length: int, parts: Sequence[Reading]) -> None:
        self._length = length
        parts = [part for part in parts if len(part.words) >= length]
        heads = [(part.owner, gram_hashes(part.words[:length], length)) for part in parts]
        self._set = _Sorted(*_flat(heads))
        self._rest: dict[int, list[tuple[int, int, int]]] = {}
        for part, (owner, head) in zip(parts, heads, strict=True):
            count = len(part.words)
            whole = int(gram_hashes(part.words, count)[0])
            self._rest.setdefault(int(head[0]), []).append((count, whole, owner))

    def hit(self, words: np.ndarray, view: str) -> Hit | None:
        """The first hit in a text."""
        at, index = self._set.find(gram_hashes(words, self._length))
        for start, head in zip(at.tolist(), self._set.hashes[index].tolist(), strict=True):
            for count, whole, owner in self._rest[head]:
                run = gram_hashes(words[start : start + count], count)
                if len(run) and int(run[0]) == whole:
                    return Hit(owner, start, start + count, view)
        return None


@final
class ShareOfGrams:
    """Parts of items by the share of their distinct n-grams that a text has."""

    def __init__(self, length: int, parts: Sequence[Reading], ratios: Sequence[float]) -> None:
        self._length = length
        grams = [np.unique(gram_hashes(part.words, length)) for part in parts]
        hashes, rows = _flat(list(enumerate(grams)))
        order = np.argsort(hashes, kind="stable")
        self._set = _Sorted(hashes, rows)
        # Who has a hash: the rows from its start to the next one's.
        self._rows = rows[order]
        self._starts = np.append(np.searchsorted(hashes[order], self._set.hashes), len(hashes))
        self._owners = [part.owner for part in parts]
        # A hair below, so that a ratio of 0.7 is reached by 7 of 10.
        least = np.array(ratios) * [len(one) for one in grams] - 1e-9
        self._least = np.maximum(least, 1e-9)

    def hit(self, words: np.ndarray, view: str) -> Hit | None:
        """The first part that the text has enough of; from its first n-gram to the last."""
        at, index = self._set.find(gram_hashes(words, self._length))
        if not len(at):
            return None
        distinct = np.unique(index)
        spans = [self._rows[self._starts[i] : self._starts[i + 1]] for i in distinct]
        counts = np.bincount(np.concatenate(spans), minlength=len(self._owners))
        enough = np.flatnonzero(counts >= self._least)
        if not len(enough):
            return None
        row = int(enough[0])
        mine = {i for i, span in zip(distinct.tolist(), spans, strict=True) if row in span}
        own = at[[i in mine for i in index.tolist()]]
        return Hit(self._owners[row], int(own[0]), int(own[-1]) + self._length, view)


Index = AnyGram | WholePart | ShareOfGrams


def first_hit(indices: Sequence[Index], text: str) -> Hit | None:
    """The first thing that a text shares with any of the indices."""
    for view in views(text):
        words = _words(view)
        for index in indices:
            hit = index.hit(words, view)
            if hit is not None:
                return hit
    return None


def _flat(grams: Sequence[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of hashes as one, and beside it who owns each."""
    if not grams:
        return np.zeros(0, np.uint64), np.zeros(0, np.int32)
    owners = np.array([owner for owner, _ in grams], np.int32)
    hashes = np.concatenate([hashes for _, hashes in grams])
    return hashes, np.repeat(owners, [len(hashes) for _, hashes in grams])
