"""Plain texts: books, notes, documentation; each file also compressed.

A file above the limit, such as a collection of books, is cut at blank lines or line ends.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moebius.curate.document import Document, Kind, Unread
from moebius.curate.read import LIMIT, Reader, Task, split_tasks
from moebius.curate.read.charset import recoded, survey
from moebius.curate.read.listing import by_ending, find_files, key_of, root_of
from moebius.curate.read.streams import DAMAGED, ENDINGS, TOO_MUCH, Damaged, TooMuch, unpack
from moebius.data.documents import PROSE
from moebius.data.readers import pieces

TEXTS = tuple(text + ending for ending in ENDINGS for text in PROSE)


@dataclass(frozen=True)
class Texts(Reader):
    """Plain files, one document each."""

    kind: Kind = "prose"

    def tasks(self, task_bytes: int) -> tuple[list[Task], list[Unread]]:
        files, unread = find_files(self.path, by_ending(TEXTS), ", ".join(PROSE) + " (.gz, .zst)")
        return split_tasks(files, task_bytes), unread

    def read(self, task: Task) -> Iterator[Document | Unread]:
        for name in task.files:
            key, path = key_of(name), root_of(self.path) / name
            try:
                yield from self._file(key, path)
            except OSError:
                yield Unread(key, "unreadable file")
            except Damaged:
                yield Unread(key, DAMAGED, path.stat().st_size)
            except TooMuch:
                yield Unread(key, TOO_MUCH, path.stat().st_size)

    def _file(self, key: str, path: Path) -> Iterator[Document | Unread]:
        with unpack(path) as stream:
            charset = survey(stream)
        if charset.reason:
            yield Unread(key, charset.reason, charset.num_bytes)
            return
        with recoded(unpack(path), charset) as stream:
            parts = pieces(stream.read, LIMIT, blank=True)
            part, number = next(parts, b""), 0
            following = next(parts, None)
            if following is None:
                yield self._document(key, part)
                return
            while part is not None:
                yield self._document(f"{key}~{number}", part)
                part, following, number = following, next(parts, None), number + 1

    def _document(self, key: str, part: bytes) -> Document | Unread:
        text = part.decode()
        if not text.strip():
            return Unread(key, "empty document", len(part))
        return Document(key, text, source=self.name, kind=self.kind)
