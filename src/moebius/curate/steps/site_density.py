"""Drops whole sites with much private data or many adult words, whatever the single page holds.

Llama 3 (section 3.1.1) removes domains "with high volumes of PII" and domains "known to contain
adult content". Here a site is a registered domain; what its pages hold together decides. The
thresholds are unpublished; those below are guesses to be looked at in the report.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from moebius.curate.addresses import site_of
from moebius.curate.document import Document, Dropped, Kind
from moebius.curate.private import find
from moebius.curate.step import CorpusStep, Decision, Round, Whole, look_up
from moebius.curate.steps.dirty_words import IGNORED, Count, load_list
from moebius.curate.text import hash_of, words

# What the pages of a site add up to.
_SUMS = ("pages", "words", "private", "dirty")
_RECORD = np.dtype([("hash", np.uint64), *((name, np.int64) for name in _SUMS)])
# A site to be dropped: for private data or else for adult words, and how much it has per word.
_VERDICT = np.dtype([("hash", np.uint64), ("private", np.int64), ("share", np.float64)])


@dataclasses.dataclass(frozen=True)
class SiteDensity(CorpusStep):
    """Drops the pages of sites above a density, where the site has `min_pages` pages or more.

    Private data are the kinds that `mask` knows; where `mask` came before, its count is taken.
    `lists` maps languages (ISO 639-3) to files of adult words; without any, only private data
    counts. Documents without an address pass and count for nothing.
    """

    kinds: tuple[Kind, ...] = ("web",)
    lists: Mapping[str, str] = dataclasses.field(default_factory=dict)
    max_pii_per_1000_words: float = 20.0
    max_dirty_share: float = 0.01
    min_pages: int = 5

    def __post_init__(self) -> None:
        if self.max_pii_per_1000_words < 0 or self.max_dirty_share < 0 or self.min_pages < 1:
            raise ValueError("site_density: densities are 0 or more, min_pages 1 or more")

    def build(self) -> Whole:
        return _Sites(self)


class _Sites(Whole):
    def __init__(self, config: SiteDensity) -> None:
        counts = {language: load_list(path, IGNORED) for language, path in config.lists.items()}
        self.rounds = (_Adding(config, counts),)

    def apply(self, document: Document, place: int, verdicts: np.ndarray) -> Decision:
        site = site_of(document.url)
        verdict = look_up(verdicts, hash_of(site)) if site else None
        if verdict is None:
            return document
        if verdict["private"]:
            rate = f"{site}: {1000 * verdict['share']:.1f} in 1000 words"
            return Dropped("site with much private data", rate)
        return Dropped("site with adult words", f"{site}: {verdict['share']:.2%} of its words")


class _Adding(Round):
    """Each page's counts, added up by site."""

    def __init__(self, config: SiteDensity, counts: Mapping[str, Count]) -> None:
        self._config, self._counts = config, counts

    def records(self, document: Document, place: int, known: np.ndarray | None) -> np.ndarray:
        site = site_of(document.url)
        if not site:
            return np.zeros(0, _RECORD)
        text = document.text.casefold()
        found = words(text)
        private = document.scores.get("pii")
        private = len(find(document.text)) if private is None else int(private)
        record = (hash_of(site), 1, len(found), private, self._dirty(document, text, found))
        return np.array([record], _RECORD)

    def _dirty(self, document: Document, text: str, found: list[str]) -> int:
        """Adult words by the list of the language; by each, the most, where none is known."""
        if document.language:
            chosen = [self._counts[document.language]] if document.language in self._counts else []
        else:
            chosen = list(self._counts.values())
        return max((count(text, found) for count in chosen), default=0)

    def combine(self, records: np.ndarray) -> np.ndarray:
        if not len(records):
            return records
        starts = np.flatnonzero(np.diff(records["hash"], prepend=~records["hash"][:1]))
        sums = np.zeros(len(starts), _RECORD)
        sums["hash"] = records["hash"][starts]
        for name in _SUMS:
            sums[name] = np.add.reduceat(records[name], starts)
        return sums

    def settle(self, records: np.ndarray) -> np.ndarray:
        sites = self.combine(records)
        lengths = np.maximum(sites["words"], 1)
        private, dirty = sites["private"] / lengths, sites["dirty"] / lengths
        much = private * 1000 > self._config.max_pii_per_1000_words
        bad = (much | (dirty > self._config.max_dirty_share)) & (
            sites["pages"] >= self._config.min_pages
        )
        verdicts = np.zeros(int(bad.sum()), _VERDICT)
        verdicts["hash"] = sites["hash"][bad]
        verdicts["private"] = much[bad]
        verdicts["share"] = np.where(much, private, dirty)[bad]
        return verdicts
