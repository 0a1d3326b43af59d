"""Exact deduplication over the whole corpus: of documents of the same text the first is kept.

Texts are compared by 128-bit hashes (xxh3), byte by byte or as their normalised words; pages not
yet extracted by their bytes.
"""

import dataclasses
from typing import final

import numpy as np
import xxhash

from moebius.curate.document import Document, Dropped
from moebius.curate.groups import by_place, repeats
from moebius.curate.step import CorpusStep, Decision, Round, Whole, look_up
from moebius.curate.text import normalised

_RECORD = np.dtype([("hash", "<u8"), ("check", "<u8"), ("place", "<u8")])


@final
class _Texts(Round):
    def __init__(self, normalise: bool) -> None:
        self._normalise = normalise

    def records(self, document: Document, place: int, known: np.ndarray | None) -> np.ndarray:
        """The text's hash, 128 bits; nothing where there is no text."""
        text = normalised(document.text) if self._normalise else document.text
        data = document.raw or text.encode("utf-8", "surrogatepass")
        if not data:
            return np.zeros(0, _RECORD)
        check, name = divmod(xxhash.xxh3_128_intdigest(data), 1 << 64)
        return np.array([(name, check, place)], _RECORD)

    def settle(self, records: np.ndarray) -> np.ndarray:
        return repeats(records, ("hash", "check"))

    def unite(self, findings: np.ndarray) -> np.ndarray:
        return by_place(findings)


@final
class _FirstOfText(Whole):
    def __init__(self, normalise: bool) -> None:
        self.rounds = (_Texts(normalise),)

    def apply(self, document: Document, place: int, verdicts: np.ndarray) -> Decision:
        found = look_up(verdicts, place)
        if found is None:
            return document
        return Dropped("exact duplicate", f"of place {found['kept']}")


@final
@dataclasses.dataclass(frozen=True)
class ExactDedup(CorpusStep):
    """Keep the first document of each text.

    With `normalise`, texts are the same that have the same words but for case, accents and digits.
    Empty ones pass.
    """

    normalise: bool = False

    def build(self) -> Whole:
        """The one round and the decision."""
        return _FirstOfText(self.normalise)
