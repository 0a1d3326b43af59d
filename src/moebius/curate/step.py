"""The step seam of curation: one file a step, a frozen config with `build`, a line in `TABLE`.

A `Filter` decides on one document at a time. A `CorpusStep` needs the whole corpus: in each of its
rounds every document gives records, records of equal hash meet and are settled, and what was found
is united into verdicts; then each document is decided with the verdicts at hand. Both are pure:
what they say depends on documents alone, never on workers, shards or order of execution.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np

from moebius.config import Variant
from moebius.curate.document import KINDS, Document, Dropped, Kind

TABLE = {
    # web pages -> text
    "extract": "moebius.curate.steps.extract:Extract",
    "repair": "moebius.curate.steps.repair:Repair",
    # filters of one document
    "url_list": "moebius.curate.steps.url_list:UrlList",
    "language": "moebius.curate.steps.language:Language",
    "gopher_quality": "moebius.curate.steps.gopher_quality:GopherQuality",
    "gopher_repetition": "moebius.curate.steps.gopher_repetition:GopherRepetition",
    "line_repetition": "moebius.curate.steps.line_repetition:LineRepetition",
    "c4": "moebius.curate.steps.c4:C4",
    "fineweb": "moebius.curate.steps.fineweb:FineWeb",
    "dirty_words": "moebius.curate.steps.dirty_words:DirtyWords",
    "template": "moebius.curate.steps.template:Template",
    "mask": "moebius.curate.steps.mask:Mask",
    "detect": "moebius.curate.steps.detect:Detect",
    "quality": "moebius.curate.steps.quality:Quality",
    "topic": "moebius.curate.steps.topic:Topic",
    "decontaminate": "moebius.curate.steps.decontaminate:Decontaminate",
    # decisions over the whole corpus
    "site_density": "moebius.curate.steps.site_density:SiteDensity",
    "unusual_tokens": "moebius.curate.steps.unusual_tokens:UnusualTokens",
    "url_dedup": "moebius.curate.steps.url_dedup:UrlDedup",
    "exact_dedup": "moebius.curate.steps.exact_dedup:ExactDedup",
    "minhash": "moebius.curate.steps.minhash:MinHash",
    "line_dedup": "moebius.curate.steps.line_dedup:LineDedup",
    "semantic_dedup": "moebius.curate.steps.semantic_dedup:SemanticDedup",
}

Decision = Document | Dropped
Decide = Callable[[Document], Decision]


@dataclasses.dataclass(frozen=True)
class Step(Variant, ABC):
    """The config of a step. Documents of other kinds or sources than it names pass unseen."""

    TABLE: ClassVar[Mapping[str, str]] = TABLE
    SEAM: ClassVar[str] = "curation step"

    kinds: tuple[Kind, ...] = KINDS
    sources: tuple[str, ...] = ()

    def takes(self, document: Document) -> bool:
        """Whether the step looks at this document."""
        return document.kind in self.kinds and (not self.sources or document.source in self.sources)

    @abstractmethod
    def build(self) -> "Decide | Whole":
        """What the step does, with its lists and models loaded."""


@dataclasses.dataclass(frozen=True)
class Filter(Step, ABC):
    """The config of a step that decides on one document at a time."""

    @abstractmethod
    def build(self) -> Decide:
        """The decision, with its lists and models loaded; built once in each worker process.

        Raises ValueError in one line where a file it names is missing or a package is not there.
        """


class Round(ABC):
    """One round of a corpus step. Records are structured arrays; their field `hash` is uint64."""

    @abstractmethod
    def records(self, document: Document, place: int, known: np.ndarray | None) -> np.ndarray:
        """What one document gives: any number of records.

        `place` identifies the document (uint64; sorted by it, documents stand in reading order);
        `known` is what the round before united, None in the first.
        """

    def combine(self, records: np.ndarray) -> np.ndarray:
        """Fewer records that mean the same (counts added up), sorted by hash; in and out sorted."""
        return records

    @abstractmethod
    def settle(self, records: np.ndarray) -> np.ndarray:
        """All records of a range of hashes, sorted by all their fields -> what is found in them.

        Findings are records of any dtype. Equal hashes are never split over two calls.
        """

    def condense(self, findings: np.ndarray) -> np.ndarray:
        """Fewer findings that mean the same; called as each range's are added to those before."""
        return findings

    def unite(self, findings: np.ndarray) -> np.ndarray:
        """All findings of the round, condensed -> its verdicts. Kept sorted by the first field."""
        return findings


class Whole(ABC):
    """What a corpus step does, in rounds, and at last with the verdicts of the last round."""

    rounds: tuple[Round, ...]

    @abstractmethod
    def apply(self, document: Document, place: int, verdicts: np.ndarray) -> Decision:
        """Decide on one document. `verdicts` may be a memory map, sorted by its first field."""


@dataclasses.dataclass(frozen=True)
class CorpusStep(Step, ABC):
    """The config of a step that decides with the whole corpus in view."""

    @abstractmethod
    def build(self) -> Whole:
        """The rounds and the decision; built once in each worker process."""


def look_up(sorted_by_first: np.ndarray, value: int) -> np.void | None:
    """The record whose first field is `value`, or None, by binary search."""
    if len(sorted_by_first) == 0:
        return None
    name = (sorted_by_first.dtype.names or ("",))[0]
    column = sorted_by_first[name]
    index = int(np.searchsorted(column, np.asarray(value, column.dtype)))
    return sorted_by_first[index] if index < len(column) and column[index] == value else None
