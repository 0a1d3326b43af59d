"""Remove lines that repeat themselves, as logs and error dumps do: Llama 3's line rule.

Llama 3 (2024), section 3.1.1: duplicated n-gram coverage removes repeated content that line
deduplication cannot see, because the lines are long and unique. Its thresholds are not published:
Gopher's for n = 5 to 10 are taken, on one line, of its characters. An n-gram counts where it has
stood in the same line before.
"""

import dataclasses

import numpy as np

from moebius.curate.document import Document, Dropped
from moebius.curate.step import Decide, Decision, Filter, Kind
from moebius.curate.steps.gopher_quality import characters_per_word
from moebius.curate.steps.gopher_repetition import DUPLICATE_NGRAMS, covered, repeats, word_ids
from moebius.curate.text import words


@dataclasses.dataclass(frozen=True)
class LineRepetition(Filter):
    """A document is dropped where less than `min_left` of its characters is left."""

    kinds: tuple[Kind, ...] = ("web", "prose")
    duplicate_ngrams: tuple[tuple[int, float], ...] = DUPLICATE_NGRAMS
    min_left: float = 0.3

    def __post_init__(self) -> None:
        if not self.duplicate_ngrams or min(n for n, _ in self.duplicate_ngrams) < 2:
            raise ValueError("duplicate_ngrams takes pairs [n, share] of n >= 2, and needs one")

    def build(self) -> Decide:
        return self._decide

    def _decide(self, document: Document) -> Decision:
        lines = document.text.split("\n")
        # A line in which no word stands twice often enough has no such n-gram either.
        least = min(n for n, _ in self.duplicate_ngrams)
        looked_at: list[int] = []
        found: list[list[str]] = []
        for index, line in enumerate(lines):
            if line.count(" ") >= least or not line.isascii():
                of_line = words(line)
                if len(of_line) - len(set(of_line)) >= least:
                    looked_at.append(index)
                    found.append(of_line)
        if not found:
            return document
        repetitive = self._repetitive(found, np.array([len(lines[i]) for i in looked_at]))
        removed = {looked_at[i] for i in np.flatnonzero(repetitive)}
        kept = [line for index, line in enumerate(lines) if index not in removed]
        left = sum(map(len, kept))
        if removed and left < self.min_left * sum(map(len, lines)):
            return Dropped("mostly repetitive lines", f"{len(removed)} of {len(lines)} lines")
        return document.with_text("\n".join(kept), "line_repetition")

    def _repetitive(self, found: list[list[str]], characters: np.ndarray) -> np.ndarray:
        """For each line, given by its words and its length, whether a threshold is exceeded."""
        wide = np.array([characters_per_word(of_line) for of_line in found])
        counts = np.array([len(of_line) for of_line in found])
        ends = np.repeat(np.cumsum(counts), counts)
        flat = [word for of_line in found for word in of_line]
        lengths = np.fromiter(map(len, flat), np.int64, len(flat))
        line = np.repeat(np.arange(len(found)), counts)
        _, ids = np.unique(line * len(flat) + word_ids(flat), return_inverse=True)
        widths = np.unique(wide).tolist()
        thresholds = dict(self.duplicate_ngrams)
        exceeded = np.zeros(len(found), bool)
        for each in repeats(ids, ends, max(thresholds) * int(wide.max())):
            for width in widths:
                share = thresholds.get(each.n // width) if each.n % width == 0 else None
                if share is not None:
                    inside = np.where(covered(each, len(flat)), lengths, 0)
                    size = np.bincount(line, inside, len(found))
                    exceeded |= (wide == width) & (size > share * characters)
        return exceeded
