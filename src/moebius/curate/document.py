"""What curation passes from step to step: a document, or the reason why there is none.

A reader gives `Document`s and, for what it could not use, `Unread`s; a step gives a document or
`Dropped`. All are counted. On disk documents are rows of parquet (`SCHEMA`), sorted as read; the
column `text` is what the trainer's loader takes.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["web", "prose", "code"]
KINDS: tuple[Kind, ...] = ("web", "prose", "code")


@dataclass(frozen=True, slots=True)
class Document:
    """One text and what is known of it.

    `key` names it within its source for good: a path relative to the source, `#row` after it where
    a file has several. `source` is the source's name in the recipe. A page not yet extracted has
    its bytes in `raw` and no text. `language` is ISO 639-3, `date` ISO 8601; both may be empty.
    `lineage` lists the steps that changed the text.
    """

    key: str
    text: str
    source: str = ""
    kind: Kind = "web"
    raw: bytes = b""
    url: str = ""
    date: str = ""
    language: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    lineage: tuple[str, ...] = ()

    def with_text(self, text: str, by: str) -> "Document":
        """The document with another text, changed by the step `by`; itself if nothing changed."""
        if text == self.text:
            return self
        return dataclasses.replace(self, text=text, lineage=(*self.lineage, by))

    def with_score(self, name: str, value: float) -> "Document":
        """The document with one score more."""
        return dataclasses.replace(self, scores={**self.scores, name: float(value)})

    def with_label(self, name: str, value: str) -> "Document":
        """The document with one label more, such as its topic."""
        return dataclasses.replace(self, labels={**self.labels, name: value})

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text; of the raw page where there is no text yet."""
        return len(self.raw) if self.raw else len(self.text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True, slots=True)
class Dropped:
    """A step's refusal. `reason` is one of few fixed phrases; `detail` says more of this one."""

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Unread:
    """What a reader found and could not make a document of: where, why, how many bytes."""

    key: str
    reason: str
    num_bytes: int = 0
