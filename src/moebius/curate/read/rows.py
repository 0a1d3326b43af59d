"""Documents from rows: JSON lines, also compressed, and parquet.

Rows are streamed and each is judged by itself: a damaged part of a file costs the rows in it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moebius.curate.document import Document, Unread
from moebius.curate.read import LIMIT, Reader, Task, split_tasks
from moebius.curate.read.listing import by_ending, find_files, key_of, root_of
from moebius.curate.read.parquet import parquet_rows
from moebius.curate.read.row import Fields
from moebius.curate.read.streams import DAMAGED, TOO_MUCH, Damaged, TooMuch, unpack
from moebius.data.documents import ROWS
from moebius.data.readers import lines

# A text of two bytes a character takes up to three times as many where JSON escapes it.
LINE_LIMIT = 2 * LIMIT


@dataclass(frozen=True)
class Rows(Reader):
    """Rows with a text, or with a raw page where `fields.html` names one.

    Other fields are taken where a row has them; `fields.id` becomes the label `id`.
    """

    fields: Fields = Fields()

    def tasks(self, task_bytes: int) -> tuple[list[Task], list[Unread]]:
        files, unread = find_files(self.path, by_ending(ROWS), ", ".join(ROWS))
        return split_tasks(files, task_bytes), unread

    def read(self, task: Task) -> Iterator[Document | Unread]:
        for name in task.files:
            key, path = key_of(name), root_of(self.path) / name
            try:
                if name.lower().endswith(".parquet"):
                    yield from self._parquet(key, path)
                else:
                    yield from self._lines(key, path)
            except OSError:
                yield Unread(key, "unreadable file")
            except Damaged:
                yield Unread(key, DAMAGED, path.stat().st_size)
            except TooMuch:
                yield Unread(key, TOO_MUCH, path.stat().st_size)

    def _lines(self, key: str, path: Path) -> Iterator[Document | Unread]:
        number, fields = -1, self.fields
        with unpack(path) as stream:
            for number, line in enumerate(lines(stream, LINE_LIMIT)):
                place = f"{key}#{number}"
                if isinstance(line, int):
                    yield Unread(place, f"line above {LINE_LIMIT >> 20} MiB", line)
                elif line.strip():
                    yield self._line(place, line, fields)
        if number < 0:
            yield Unread(key, "empty document")

    def _line(self, key: str, line: bytes, fields: Fields) -> Document | Unread:
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            return Unread(key, "invalid UTF-8", len(line))
        except (ValueError, RecursionError):
            return Unread(key, "corrupt line", len(line))
        return fields.document(key, row, len(line), self.name, self.kind)

    def _parquet(self, key: str, path: Path) -> Iterator[Document | Unread]:
        fields = self.fields
        for number, row in parquet_rows(path, fields):
            if isinstance(row, str):
                yield Unread(key if number is None else f"{key}#{number}", row)
            else:
                yield fields.document(f"{key}#{number}", row, 0, self.name, self.kind)
