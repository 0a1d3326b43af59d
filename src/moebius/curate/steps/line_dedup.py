"""Line deduplication over the whole corpus: lines seen too often are removed wherever they stand.

Llama 3 (section 3.1.1), after ccNet: a line that occurs more than 6 times in a bucket of 30M
documents goes. Lines of the same words but for case, accents and digits are the same; what counts
is how often they occur, several times in one document and over documents alike.
"""

import dataclasses
from typing import final

import numpy as np

from moebius.curate.document import Document, Dropped, Kind
from moebius.curate.grams import line_hashes, mix
from moebius.curate.step import CorpusStep, Decision, Round, Whole
from moebius.curate.text import hash_of, words

_RECORD = np.dtype([("hash", "<u8"), ("count", "<u8")])
_LINE = np.dtype([("hash", "<u8")])


@final
class _Lines(Round):
    def __init__(self, config: "LineDedup") -> None:
        self._config = config

    def hashes(self, document: Document) -> np.ndarray:
        """The hash of each line; 0 for the protected ones."""
        config = self._config
        bucket = hash_of(f"{document.source}\0{document.key}") % config.buckets
        hashes, lengths = line_hashes(document.text, digits_alike=True, split_apostrophes=False)
        counted = lengths >= max(config.min_characters, 1)
        return mix(hashes + np.uint64(bucket)) * counted

    def records(self, document: Document, place: int, known: np.ndarray | None) -> np.ndarray:
        """Each line with its occurrences in the document."""
        hashes = self.hashes(document)
        lines, counts = np.unique(hashes[hashes != 0], return_counts=True)
        found = np.zeros(len(lines), _RECORD)
        found["hash"], found["count"] = lines, counts
        return found

    def combine(self, records: np.ndarray) -> np.ndarray:
        """One record a line."""
        lines, starts = np.unique(records["hash"], return_index=True)
        found = np.zeros(len(lines), _RECORD)
        found["hash"] = lines
        if len(lines):
            found["count"] = np.add.reduceat(records["count"], starts)
        return found

    def settle(self, records: np.ndarray) -> np.ndarray:
        """The lines seen too often."""
        lines = self.combine(records)
        found = np.zeros(int((often := lines["count"] > self._config.max_count).sum()), _LINE)
        found["hash"] = lines["hash"][often]
        return found

    def unite(self, findings: np.ndarray) -> np.ndarray:
        return np.unique(findings["hash"]).astype(_LINE)


@final
class _WithoutRepeated(Whole):
    def __init__(self, config: "LineDedup") -> None:
        self._config = config
        self._lines = _Lines(config)
        self.rounds = (self._lines,)

    def apply(self, document: Document, place: int, verdicts: np.ndarray) -> Decision:
        if not len(verdicts):
            return document
        hashes = self._lines.hashes(document)
        often = verdicts["hash"]
        index = np.minimum(np.searchsorted(often, hashes), len(often) - 1)
        repeated = (often[index] == hashes) & (hashes != 0)
        if not repeated.any():
            return document
        lines = document.text.split("\n")
        text = "\n".join(lines[i] for i in np.flatnonzero(~repeated)).strip("\n")
        if len(words(text)) < self._config.min_words:
            return Dropped("only repeated lines", f"{int(repeated.sum())} of {len(lines)} lines")
        return document.with_text(text, "line_dedup")


@final
@dataclasses.dataclass(frozen=True)
class LineDedup(CorpusStep):
    """Remove lines that occur more than `max_count` times, every time they occur.

    Lines whose words, joined by spaces, have fewer than `min_characters` stay; a document left with
    fewer than `min_words` words is dropped. `buckets` divides the corpus, by documents' names, into
    parts that count on their own: raise it so that a part has about 30 million documents at most,
    for in a larger one even good lines occur 7 times. Code is left alone unless `kinds` says
    otherwise.
    """

    kinds: tuple[Kind, ...] = ("web", "prose")
    max_count: int = 6
    min_characters: int = 10
    min_words: int = 5
    buckets: int = 1

    def __post_init__(self) -> None:
        if self.max_count < 1 or self.buckets < 1:
            raise ValueError("line_dedup: max_count and buckets must be at least 1")

    def build(self) -> Whole:
        """The one round and the decision."""
        return _WithoutRepeated(self)
