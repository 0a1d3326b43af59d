"""Pages from WARC files, plain, .gz or .zst, as crawlers such as Common Crawl's leave them.

Whether a record is a page is told from its bytes, not from its headers (datatrove 0.10 drops pages
whose record does not name its type). All other records are counted by what they are.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from moebius.curate.document import Document, Unread
from moebius.curate.read import Reader, Task, split_tasks
from moebius.curate.read.listing import by_ending, find_files, key_of, root_of
from moebius.curate.read.records import Record, records
from moebius.curate.read.response import Unusable, page_of
from moebius.curate.read.sniff import clean_url, not_html, page_url
from moebius.curate.read.streams import DAMAGED, ENDINGS, TOO_MUCH, Damaged, TooMuch

WARCS = tuple(f".warc{ending}" for ending in ENDINGS)
_PAGES = ("response", "resource")
_OTHERS = ("request", "metadata", "warcinfo", "revisit", "conversion", "continuation")
# What a server says of a page; `extract` tries it after what the bytes say.
_CHARSET = re.compile(r"charset=[\"']?([\w.:-]{1,40})", re.IGNORECASE)
_DATE = re.compile(r"\d{4}(-\d\d(-\d\d(T\d\d:\d\d(:\d\d(\.\d{1,9})?)?Z?)?)?)?")


@dataclass(frozen=True)
class Warc(Reader):
    """Responses and resources that are HTML, with the address and date of their record."""

    def tasks(self, task_bytes: int) -> tuple[list[Task], list[Unread]]:
        files, unread = find_files(self.path, by_ending(WARCS), ", ".join(WARCS))
        return split_tasks(files, task_bytes), unread

    def read(self, task: Task) -> Iterator[Document | Unread]:
        for name in task.files:
            yield from self._file(name)

    def _file(self, name: str) -> Iterator[Document | Unread]:
        key, number = key_of(name), 0
        path = root_of(self.path) / name
        try:
            for number, record in enumerate(records(path), 1):
                yield self._document(f"{key}#{number - 1}", record)
            if not number:
                yield Unread(key, "empty document")
        except OSError:
            yield Unread(key, "unreadable file")
        except Damaged:
            yield Unread(key, DAMAGED, path.stat().st_size)
        except TooMuch:
            yield Unread(key, TOO_MUCH, path.stat().st_size)

    def _document(self, key: str, record: Record) -> Document | Unread:
        if record.reason:
            return Unread(key, record.reason, record.size)
        headers, content = record.headers, record.content
        type_ = headers.get("warc-type", "").lower()
        if type_ in _OTHERS:
            return Unread(key, f"{type_} record", record.size)
        declared = headers.get("content-type", "")
        if type_ not in _PAGES and not content.startswith(b"HTTP/") and not_html(content, declared):
            return Unread(key, "record of no known type", record.size)
        try:
            page, inner = page_of(content)
        except Unusable as error:
            return Unread(key, str(error), record.size)
        if not page.strip():
            return Unread(key, "empty document", record.size)
        if reason := not_html(page, inner or ("" if "http" in declared.lower() else declared)):
            return Unread(key, reason, record.size)
        date = headers.get("warc-date", "")
        charset = _CHARSET.search(inner)
        return Document(
            key,
            "",
            source=self.name,
            kind=self.kind,
            raw=page,
            url=clean_url(headers.get("warc-target-uri", "")) or page_url(page),
            date=date if _DATE.fullmatch(date) else "",
            labels={"charset": charset[1].lower()} if charset else {},
        )
