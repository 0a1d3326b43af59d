"""Masks private data: e-mail addresses, phone, card and account numbers, public IP addresses.

Llama 3 (section 3.1.1) and FineWeb do so after extraction; which patterns count is written in
`curate.private`. Each piece becomes its kind in angle brackets, `<EMAIL>`; how many there were is
the score `pii`. Code is left alone unless asked for: there such numbers are data.
"""

import dataclasses

from moebius.curate.document import Document, Kind
from moebius.curate.private import PRIVATE_KINDS, PrivateKind, mask
from moebius.curate.step import Decide, Decision, Filter


@dataclasses.dataclass(frozen=True)
class Mask(Filter):
    """Masks the kinds of private data in `what`; never drops a document."""

    what: tuple[PrivateKind, ...] = PRIVATE_KINDS
    kinds: tuple[Kind, ...] = ("web", "prose")

    def __post_init__(self) -> None:
        if not self.what:
            raise ValueError(f"mask has nothing to mask; name in `what` some of {PRIVATE_KINDS}")

    def build(self) -> Decide:
        def decide(document: Document) -> Decision:
            text, found = mask(document.text, self.what)
            return document.with_text(text, "mask").with_score("pii", len(found))

        return decide
