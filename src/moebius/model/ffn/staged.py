"""A feed-forward whose `finish` a block may take in two, so that its way back runs beside work too.

`begin` sends tokens away, `compute` waits for those that came, computes and sends results back,
`finish` waits for the results.
"""

from abc import ABC, abstractmethod

from moebius.model.ffn import FeedForward, Pending


class Staged(FeedForward, ABC):
    """The contract of three calls instead of two."""

    @abstractmethod
    def compute(self, pending: Pending) -> Pending:
        """What `finish` would do first, done now."""


def compute(ffn: FeedForward, pending: Pending) -> Pending:
    """The same for any feed-forward: one that has nothing in the middle is left as it is."""
    return ffn.compute(pending) if isinstance(ffn, Staged) else pending
