"""Drops documents whose words are distributed least like those of the corpus.

Llama 3 (section 3.1.1) drops documents "with excessive numbers of outlier tokens" by the KL
divergence of their token distribution from the corpus's. The divergence D = sum p log(p / q) falls
with length, so documents are compared with those of their language and length (by powers of two),
and of each such group the share with the highest D is dropped. p are the shares of words in the
document, q those in all documents of its language, with one added to each count.
"""

import dataclasses
from collections import Counter

import numpy as np

from moebius.curate.document import Document, Dropped, Kind
from moebius.curate.step import CorpusStep, Decision, Round, Whole, look_up
from moebius.curate.text import hash_of, hashes_of, words

# A word of a language and how often it occurs; where `hash` is `language`, all its words together.
_COUNT = np.dtype([("hash", np.uint64), ("language", np.uint64), ("count", np.int64)])
_DIVERGENCE = np.dtype([("hash", np.uint64), ("divergence", np.float64), ("place", np.uint64)])
_OUTLIER = np.dtype([("place", np.uint64), ("divergence", np.float64), ("most", np.float64)])


@dataclasses.dataclass(frozen=True)
class UnusualTokens(CorpusStep):
    """Drops the `share` of documents of each language and length that diverge most.

    Groups of fewer than `min_documents` are left alone. Of each language the `vocabulary` most
    frequent words count; all others have q as if never seen. A group is settled in memory, 24 bytes
    a document: `groups` above 1 divides each at random, for corpora of a billion documents.
    """

    kinds: tuple[Kind, ...] = ("web", "prose")
    share: float = 0.01
    min_documents: int = 100
    vocabulary: int = 65_536
    groups: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share is what part to drop, above 0 and below 1, not {self.share}")
        if min(self.min_documents, self.vocabulary, self.groups) < 1:
            raise ValueError("min_documents, vocabulary and groups are 1 or more")

    def build(self) -> Whole:
        return _Outliers(self)


class _Outliers(Whole):
    def __init__(self, config: UnusualTokens) -> None:
        self.rounds = (_Counting(config), _Diverging(config))

    def apply(self, document: Document, place: int, verdicts: np.ndarray) -> Decision:
        verdict = look_up(verdicts, place)
        if verdict is None:
            return document
        detail = f"divergence {verdict['divergence']:.2f}, at most {verdict['most']:.2f}"
        return Dropped("unusual words", detail)


class _Counting(Round):
    """How often each word of each language occurs in the corpus."""

    def __init__(self, config: UnusualTokens) -> None:
        self._vocabulary = config.vocabulary

    def records(self, document: Document, place: int, known: np.ndarray | None) -> np.ndarray:
        hashes, counts, language = _words_of(document)
        records = np.zeros(len(hashes) + 1, _COUNT)
        records["language"] = language
        records["hash"][:-1], records["hash"][-1] = hashes, language
        records["count"][:-1], records["count"][-1] = counts, counts.sum()
        return records if len(hashes) else records[:0]

    def combine(self, records: np.ndarray) -> np.ndarray:
        if not len(records):
            return records
        starts = np.flatnonzero(np.diff(records["hash"], prepend=~records["hash"][:1]))
        sums = records[starts]
        sums["count"] = np.add.reduceat(records["count"], starts)
        return sums

    def settle(self, records: np.ndarray) -> np.ndarray:
        return self._most_frequent(self.combine(records))

    def unite(self, findings: np.ndarray) -> np.ndarray:
        """The most frequent words; each language's total with what smoothing adds to it."""
        kept = self._most_frequent(findings)
        languages, sizes = np.unique(kept["language"], return_counts=True)
        total = kept["hash"] == kept["language"]
        kept["count"][total] += sizes[np.searchsorted(languages, kept["language"][total])] - 1
        return kept

    def _most_frequent(self, records: np.ndarray) -> np.ndarray:
        """Of each language the total and the most frequent words; of equals those of lower hash."""
        total = records["hash"] == records["language"]
        order = np.lexsort((records["hash"], -records["count"], ~total, records["language"]))
        ordered = records[order]
        language = ordered["language"]
        starts = np.flatnonzero(np.diff(language, prepend=~language[:1]))
        sizes = np.diff(starts, append=len(ordered))
        rank = np.arange(len(ordered)) - np.repeat(starts, sizes)
        # Where the total is in another range, a language begins with a word.
        headed = np.repeat(ordered["hash"][starts] == language[starts], sizes)
        return ordered[rank < self._vocabulary + headed]


class _Diverging(Round):
    """How far each document is from its language, and which are the farthest of their length."""

    def __init__(self, config: UnusualTokens) -> None:
        self._config = config

    def records(self, document: Document, place: int, known: np.ndarray | None) -> np.ndarray:
        hashes, counts, language = _words_of(document)
        total = look_up(known, language) if known is not None else None
        if not len(hashes) or known is None or total is None:
            return np.zeros(0, _DIVERGENCE)
        seen = _counts_in(known, hashes)
        length = int(counts.sum())
        shares = counts / length
        divergence = float(np.sum(shares * np.log(shares * int(total["count"]) / (seen + 1))))
        group = hash_of(f"{document.source}\n{document.key}") % self._config.groups
        bucket = hash_of(f"{document.language} {length.bit_length()} {group}")
        return np.array([(bucket, round(divergence, 6), place)], _DIVERGENCE)

    def settle(self, records: np.ndarray) -> np.ndarray:
        starts = np.flatnonzero(np.diff(records["hash"], prepend=~records["hash"][:1]))
        found = [np.zeros(0, _OUTLIER)]
        for bucket in np.split(records, starts[1:]):
            if len(bucket) < max(self._config.min_documents, 1):
                continue
            # Sorted by divergence: the last of those that stay, above which all go.
            dropped = int(len(bucket) * self._config.share + 1e-9)
            most = bucket["divergence"][len(bucket) - dropped - 1]
            above = bucket[bucket["divergence"] > most]
            outliers = np.zeros(len(above), _OUTLIER)
            outliers["place"], outliers["divergence"] = above["place"], above["divergence"]
            outliers["most"] = most
            found.append(outliers)
        return np.concatenate(found)


def _words_of(document: Document) -> tuple[np.ndarray, np.ndarray, int]:
    """The hashes of a document's distinct words, sorted, their counts, and its language's hash."""
    language = hash_of(document.language)
    counted = Counter(words(document.text.casefold()))
    hashes = hashes_of(list(counted), language)
    counts = np.fromiter(counted.values(), np.int64, len(counted))
    order = np.argsort(hashes)
    return hashes[order], counts[order], language


def _counts_in(known: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """The corpus's counts of words, 0 where a word is not kept."""
    places = np.minimum(np.searchsorted(known["hash"], hashes), len(known) - 1)
    return np.where(known["hash"][places] == hashes, known["count"][places], 0)
