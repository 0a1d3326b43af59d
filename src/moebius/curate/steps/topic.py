"""Topics: label each document with a scorer's best class, and thin out classes there is much of.

Llama 3 (2407.21783, 3.1.2) down-samples what the web has too much of, arts and entertainment, by a
classifier of knowledge. Which documents of a class stay, a hash of their keys decides.
"""

import dataclasses
from collections.abc import Mapping

from moebius.config import nearest
from moebius.curate.document import Document, Dropped
from moebius.curate.scorers import Scorer
from moebius.curate.scorers.linear import Linear
from moebius.curate.step import Decide, Decision, Filter
from moebius.curate.steps.quality import drawn, scores_of


@dataclasses.dataclass(frozen=True)
class Topic(Filter):
    """Label documents under `name`; keep the `share` of a class, all of those it does not name."""

    scorer: Scorer = Linear()
    share: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    name: str = "topic"

    def __post_init__(self) -> None:
        for topic, share in self.share.items():
            if not 0 <= share <= 1:
                raise ValueError(f"share of {topic!r} must be from 0 to 1, not {share}")

    def build(self) -> Decide:
        scores = self.scorer.build()

        def decide(document: Document) -> Decision:
            found = scores_of(scores, document)
            if isinstance(found, Dropped):
                return found
            for topic in self.share:
                if topic not in found:
                    raise ValueError(
                        f"share names {topic!r}, a class the scorer lacks{nearest(topic, found)}"
                    )
            # Of equal scores the first class by name, whatever order the scorer lists them in.
            best = min(found, key=lambda topic: (-found[topic], topic))
            if drawn(document, self.seed) < self.share.get(best, 1.0):
                return document.with_label(self.name, best)
            return Dropped("over-represented topic", f"{self.name} {best}")

        return decide
