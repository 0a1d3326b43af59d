"""Exact deduplication over the whole corpus: of documents of the same text the first is kept.

Texts are compared by 128-bit hashes (xxh3), byte by byte or word by word; pages not yet extracted
by their bytes.
"""

import dataclasses
from typing import final

import numpy as np
import xxhash

from moebius.curate.document import Document, Dropped
from moebius.curate.grams import word_hashes
from moebius.curate.groups import by_place, repeats
from moebius.curate.step import CorpusStep, Decision, Round, Whole, look_up

_RECORD = np.dtype([("hash", "<u8"), ("check", "<u8"), ("place", "<u8")])


@final
class _Texts(Round):
    def __init__(self, normalise: bool) -> None:
        self._normalise = normalise

    def records(self, document: Document, place: int, known: np.ndarray | None) -> np.ndarray:
        """The text's hash, 128 bits; nothing where there is no text."""
        data = document.raw or self._compared(document.text)
        if not data:
            return np.zeros(0, _RECORD)
        check, name = divmod(xxhash.xxh3_128_intdigest(data), 1 << 64)
        return np.array([(name, check, place)], _RECORD)

    def _compared(self, text: str) -> bytes:
        if self._normalise:
            return word_hashes(text, digits_alike=False, split_apostrophes=False).tobytes()
        return text.encode("utf-8", "surrogatepass")

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

    With `normalise`, texts are the same that have the same words but for case and accents; numbers
    count, unlike in `minhash`. Empty texts pass.
    """

    normalise: bool = False

    def build(self) -> Whole:
        """The one round and the decision."""
        return _FirstOfText(self.normalise)
