"""Scorers by plain rules, as a user writes one: they judge where a test needs to know the answer.

Named in configs as `tests/curate/scorers/rules.py:Letters`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from moebius.curate.scorers import Scorer, Scores

FILE = Path(__file__)


@dataclasses.dataclass(frozen=True)
class Letters(Scorer):
    """The share of each of `letters` in a text; a text with a question mark has no score."""

    letters: str = "ab"

    def build(self) -> Scores:
        return _Shares(self.letters)


class _Shares(Scores):
    def __init__(self, letters: str) -> None:
        self.letters = letters

    def score(self, texts: Sequence[str]) -> list[dict[str, float]]:
        return [{} if "?" in text else self._one(text) for text in texts]

    def _one(self, text: str) -> dict[str, float]:
        shares = {c: text.count(c) / max(1, len(text)) for c in self.letters}
        return {"score": shares[self.letters]} if len(self.letters) == 1 else shares


@dataclasses.dataclass(frozen=True)
class Constant(Scorer):
    """The same score for every text."""

    value: float = 0.0

    def build(self) -> Scores:
        return _Same(self.value)


class _Same(Scores):
    def __init__(self, value: float) -> None:
        self.value = value

    def score(self, texts: Sequence[str]) -> list[dict[str, float]]:
        return [{"score": self.value} for _ in texts]
