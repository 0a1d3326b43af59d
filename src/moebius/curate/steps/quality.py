"""Model-based quality: keep what a scorer thinks well of, and a random share of the rest.

Llama 3 (2407.21783, 3.1.1) and DCLM keep by a classifier's score; GPT-3 and others keep some of
what it refuses, so that one model's taste does not make the corpus narrow.
"""

import dataclasses
import math

from moebius.config import nearest
from moebius.curate.document import Document, Dropped
from moebius.curate.scorers import Scorer, Scores
from moebius.curate.scorers.linear import Linear
from moebius.curate.step import Decide, Decision, Filter
from moebius.curate.text import hash_of


@dataclasses.dataclass(frozen=True)
class Quality(Filter):
    """Keep documents whose `score` lies from `minimum` to `maximum`; note it under `name`."""

    scorer: Scorer = Linear()
    # The class whose score decides; a scorer of one number calls it `score`.
    score: str = "score"
    minimum: float | None = None
    maximum: float | None = None
    # This share of what the score refuses is kept anyway, chosen by a hash of its key.
    keep_random: float = 0.0
    seed: int = 0
    name: str = "quality"

    def __post_init__(self) -> None:
        if not 0 <= self.keep_random <= 1:
            raise ValueError(f"keep_random must be from 0 to 1, not {self.keep_random}")
        low, high = self.minimum, self.maximum
        if low is not None and high is not None and low > high:
            raise ValueError(f"minimum ({low}) must not be above maximum ({high})")

    def build(self) -> Decide:
        scores = self.scorer.build()

        def decide(document: Document) -> Decision:
            found = scores_of(scores, document)
            if isinstance(found, Dropped):
                return found
            if self.score not in found:
                raise ValueError(
                    f"the scorer gives no score {self.score!r}{nearest(self.score, found)}"
                )
            value = found[self.score]
            kept = document.with_score(self.name, value)
            low = self.minimum is not None and value < self.minimum
            high = self.maximum is not None and value > self.maximum
            if not (low or high) or drawn(document, self.seed) < self.keep_random:
                return kept
            bound = f"below {self.minimum}" if low else f"above {self.maximum}"
            return Dropped("low quality score", f"{self.name} {value:.4g} is {bound}")

        return decide


def scores_of(scores: Scores, document: Document) -> dict[str, float] | Dropped:
    """A document's scores; a document that has none, or one that is no number, is dropped."""
    found = scores.score([document.text])[0]
    if not found or not all(math.isfinite(value) for value in found.values()):
        return Dropped("could not be scored", "the scorer gave no number")
    return found


def drawn(document: Document, seed: int) -> float:
    """A number from 0 to below 1 that the document's source and key alone decide."""
    return (hash_of(f"{document.source}\n{document.key}", seed) >> 11) / 2**53
