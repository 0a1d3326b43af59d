"""The reader seam of curation: where documents come from. A reader is one file plus one line.

A reader lists its input files as tasks (in an order that depends on nothing but the files) and
reads one task as a stream of documents and of what could not be read. Both must bear anything:
what is wrong with an input is an `Unread` with its reason, never an exception, and no input makes
memory grow beyond `LIMIT` times a small factor.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

from moebius.config import Variant
from moebius.curate.document import Document, Kind, Unread

TABLE = {
    "warc": "moebius.curate.read.warc:Warc",
    "pages": "moebius.curate.read.pages:Pages",
    "texts": "moebius.curate.read.texts:Texts",
    "rows": "moebius.curate.read.rows:Rows",
    "repository": "moebius.curate.read.repository:Repository",
    "hub": "moebius.curate.read.hub:Hub",
}

# No page or document above this many bytes is read (uncompressed).
LIMIT = 16 << 20


@dataclasses.dataclass(frozen=True)
class Task:
    """A part of a source that one worker reads: paths relative to the source, bytes on disk."""

    files: tuple[str, ...]
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Reader(Variant, ABC):
    """The config of a source. `name` is what steps, counts and the mix call it."""

    TABLE: ClassVar[Mapping[str, str]] = TABLE
    SEAM: ClassVar[str] = "reader"

    path: str = ""
    name: str = ""
    kind: Kind = "web"

    @abstractmethod
    def tasks(self, task_bytes: int) -> tuple[list[Task], list[Unread]]:
        """The input in tasks of about `task_bytes` (a larger file is a task of its own), sorted.

        Also what was passed over, by reason. Raises ValueError where the path is not there or has
        nothing to read: that is a mistake of the user.
        """

    @abstractmethod
    def read(self, task: Task) -> Iterator[Document | Unread]:
        """The documents of one task, in an order that the input alone decides."""


def split_tasks(files: list[tuple[str, int]], task_bytes: int) -> list[Task]:
    """Files with their sizes, in order, in tasks of about `task_bytes` each."""
    tasks: list[Task] = []
    names: list[str] = []
    total = 0
    for name, size in files:
        if names and total + size > task_bytes:
            tasks.append(Task(tuple(names), total))
            names, total = [], 0
        names.append(name)
        total += size
    return [*tasks, Task(tuple(names), total)] if names else tasks
