"""The records of a WARC, whatever state it is in (ISO 28500; WARC 1.0 and 1.1).

A record ends where its Content-Length says if another record, or the end, stands there; else at
the next line that begins one: a length that is missing or wrong costs no page. A gzip member or
zstandard frame that begins with a record ends the one before. Behind damage the parser goes on at
the next record that can be found; each damage is a record with a reason.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moebius.curate.read import LIMIT
from moebius.curate.read.streams import BLOCK, TOO_LARGE, TOO_MUCH, Damaged, Members

MARK = b"WARC/"
BROKEN, GIVEN_UP = "damaged record", "too damaged to read on"
# The header block of a record; a page with the headers of its server and its chunks' sizes.
HEADER = 64 << 10
MOST = LIMIT + (1 << 20)
# A record that decompresses to more than this, and by more than this ratio, is a bomb.
BOMB, RATIO = 4 * LIMIT, 100
_HEAD = re.compile(rb"WARC/\d{1,3}\.\d{1,3}[ \t]*\r?\n")
_BLANK = re.compile(rb"\r?\n\r?\n")
_NEXT = re.compile(rb"\nWARC/[01]\.\d{1,3}[ \t]{0,8}\r?\n")
# What stands behind a record: the next, the end, or a next one whose first line is damaged.
_AFTER = re.compile(rb"[\r\n]{0,64}(?:WARC/[01]\.|\Z)|\r\n\r\n[^\n]{0,128}\nWARC-")
_NEWLINES = re.compile(rb"[\r\n]+")
OVERLAP = 64
BEHIND = 256


@dataclass(frozen=True)
class Record:
    """A record: its headers by lower-case name; `size` bytes of content, all or none of it here."""

    headers: Mapping[str, str]
    content: bytes
    size: int
    reason: str = ""


class _Window:
    """The bytes from where the parser stands up to the next sure beginning of a record."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self.data = bytearray()
        self.ended = self.damaged = False
        # Whether the damage lies in a member of which nothing is here.
        self._apart = False
        self._next: bytes | None = b""

    def fill(self, count: int) -> None:
        """Have `count` bytes, or all up to the end of this part."""
        while len(self.data) < count and not self.ended:
            try:
                block = self._members.block()
            except Damaged:
                self.ended = self.damaged = True
                self._apart = self._members.unbegun
                return
            if not block:
                self.ended, self._next = True, None
            elif self._members.fresh and block.startswith(MARK) and self.data:
                self.ended, self._next = True, block
            else:
                self.data += block

    def begin(self) -> bool:
        """Go to where the next record should begin, to the next part if need be; False at the end.

        Damage that no record has met yet stops it as well, with no data.
        """
        while True:
            self.fill(OVERLAP)
            while blank := _NEWLINES.match(self.data):
                del self.data[: blank.end()]
                self.fill(OVERLAP)
            if self.data:
                return True
            if self.damaged:
                self._apart = False
                return True
            if self.ended:
                if self._next is None:
                    return False
                self.data += self._next
                self.ended, self._next = False, b""

    def settle(self) -> bool:
        """Whether damage ended the record just read; from now on what is behind, if anything."""
        if not (self.ended and self.damaged) or self.data:
            return False
        if self._apart:
            self._apart = False
            return False
        self.damaged = False
        if self._members.resume(MARK):
            self.ended = False
        else:
            self._next = None
        return True

    def swollen(self, size: int, begun: int) -> bool:
        """Whether the record from file position `begun` on, `size` bytes by now, is a bomb."""
        used = self._members.position - begun
        return self._members.compressed and size > BOMB and size > RATIO * used

    def abandon(self) -> None:
        """Leave this part as if it were damaged here."""
        self.data.clear()
        self.ended = self.damaged = True
        self._apart = False

    @property
    def position(self) -> int:
        return self._members.position


def records(path: Path) -> Iterator[Record]:
    """All records of a file. Raises OSError where it cannot be read, else nothing."""
    members = Members(path)
    try:
        window = _Window(members)
        while window.begin():
            found = _record(window) if window.data else Record({}, b"", 0, BROKEN)
            met = window.settle()
            yield Record(found.headers, b"", found.size, found.reason or BROKEN) if met else found
        if members.given_up:
            yield Record({}, b"", members.given_up, GIVEN_UP)
    finally:
        members.close()


def _record(window: _Window) -> Record:
    begun = window.position
    window.fill(HEADER)
    head = _HEAD.match(window.data)
    # Looked for first: a file of nothing but beginnings takes no longer than its length.
    early = _NEXT.search(window.data, 1, HEADER)
    blank = _BLANK.search(window.data, 0, early.start() + 1 if early else HEADER)
    if head is None or blank is None:
        _, size, reason = _up_to_next(window, begun)
        return Record({}, b"", size, TOO_MUCH if reason == TOO_MUCH else BROKEN)
    headers = parse_headers(bytes(window.data[head.end() : blank.start()]))
    del window.data[: blank.end()]
    length = headers.get("content-length", "").strip()
    if re.fullmatch("[0-9]{1,9}", length) and int(length) <= MOST:
        window.fill(int(length) + BEHIND)
        if len(window.data) >= int(length) and _AFTER.match(window.data, int(length)):
            content = bytes(memoryview(window.data)[: int(length)])
            del window.data[: int(length)]
            if (blank := _NEWLINES.match(window.data)) is not None:
                del window.data[: blank.end()]
            return Record(headers, content, len(content))
    content, size, reason = _up_to_next(window, begun)
    return Record(headers, content, size, reason)


def _up_to_next(window: _Window, begun: int) -> tuple[bytes, int, str]:
    """The bytes before the next record: they, how many, and why they are not given if not."""
    data, gone, looked = window.data, 0, 0
    while True:
        match = _NEXT.search(data, max(0, looked - OVERLAP))
        end = match.start() + 1 if match else len(data)
        if match or window.ended:
            content = b"" if gone else bytes(memoryview(data)[:end]).rstrip(b"\r\n")
            del data[:end]
            size = gone + end if gone else len(content)
            return (b"", size, TOO_LARGE) if gone or size > MOST else (content, size, "")
        if len(data) > MOST:
            gone += len(data) - OVERLAP
            del data[:-OVERLAP]
        looked = len(data)
        if window.swollen(gone + len(data), begun):
            gone += len(data)
            window.abandon()
            return b"", gone, TOO_MUCH
        window.fill(len(data) + BLOCK)


def parse_headers(block: bytes) -> dict[str, str]:
    """Header lines by lower-case name: the first of each; folded lines joined."""
    headers: dict[str, str] = {}
    name = ""
    for line in block.decode("utf-8", "replace").split("\n")[:1000]:
        if line[:1] in (" ", "\t") and name:
            headers[name] = f"{headers[name]} {line.strip()}"[:16384]
            continue
        before, colon, value = line.partition(":")
        name = before.strip().lower() if colon else ""
        if name in headers:
            name = ""
        elif name:
            headers[name] = value.strip()
    return headers
