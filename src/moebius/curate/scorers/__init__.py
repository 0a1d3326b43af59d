"""The scorer seam of curation: what a model thinks of a text. A scorer is one file plus one line.

A scorer gives a number or a class for a text; the steps `quality` and `topic` keep or drop by it.
Scorers that need a trained moebius model live in `lab`: this room does not import the trainer.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from moebius.config import Variant

TABLE = {
    "linear": "moebius.curate.scorers.linear:Linear",
    "hf": "moebius.curate.scorers.hf:Classifier",
    "judge": "moebius.curate.scorers.judge:Judge",
    "loss": "moebius.lab.loss_scorer:LossScorer",
}


class Scores(ABC):
    """A loaded scorer."""

    @abstractmethod
    def score(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """For each text the score of each class; a scorer of one number names it `score`."""


@dataclasses.dataclass(frozen=True)
class Scorer(Variant, ABC):
    """The config of a scorer."""

    TABLE: ClassVar[Mapping[str, str]] = TABLE
    SEAM: ClassVar[str] = "scorer"

    @abstractmethod
    def build(self) -> Scores:
        """The scorer with its weights loaded. Raises ValueError where they are not there."""
