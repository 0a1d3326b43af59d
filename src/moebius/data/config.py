"""What to read: the data part of a recipe.

A corpus is one path, or several sources with weights. A path is `python:stdlib` (the library of
this Python), `python:PACKAGE` (the source of an installed package), a file, a folder, or a dataset
of the Hugging Face hub (`hf:OWNER/NAME`, `hf:FOLDER`).
`max_bytes` caps the text taken from each source, in reading order. `tokenizer` is the path of a
`tokenizer.json` to use as it is, else one is trained; `document` names its token that opens a
document. `seed` orders documents and never changes the shards, nor do weights and epochs.
"""

import os
from dataclasses import dataclass

from moebius.config import runtime


@dataclass(frozen=True)
class Source:
    """One corpus of a mixture: its share of the sequences, and how often it may be repeated."""

    path: str
    weight: float = 1.0
    max_epochs: float | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("a source needs a path")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight of {self.path!r} must be above 0, not {self.weight}")
        if self.max_epochs is not None and not 0 < self.max_epochs < float("inf"):
            raise ValueError(f"max_epochs of {self.path!r} must be above 0, not {self.max_epochs}")


@dataclass(frozen=True)
class DataConfig:
    """Which documents, how they are cut, and in which order they come."""

    path: str = ""
    sources: tuple[Source, ...] = ()
    max_bytes: int | None = None
    max_document_bytes: int = 1 << 20
    tokenizer: str | None = None
    document: str | None = None
    seed: int = 0
    cache: str = runtime(".moebius/data")
    workers: int = runtime(0)

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.sources):
            state = "both are" if self.path else "neither is"
            raise ValueError(f"set exactly one of data.path and data.sources; {state} set")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"data.max_bytes must be above 0, not {self.max_bytes}")
        if self.max_document_bytes < 64:
            raise ValueError(
                f"data.max_document_bytes must be at least 64, not {self.max_document_bytes}"
            )
        if self.document is not None and self.tokenizer is None:
            raise ValueError("data.document names a token of data.tokenizer; set that as well")
        if self.workers < 0:
            raise ValueError(f"data.workers must be 0 (all cores) or more, not {self.workers}")

    def mixture(self) -> tuple[Source, ...]:
        """The sources, a single path being a mixture of one."""
        return self.sources or (Source(self.path),)

    def num_workers(self) -> int:
        """How many groups of files are tokenised at once."""
        return self.workers or os.cpu_count() or 1
