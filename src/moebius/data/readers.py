"""Reading one file as documents, whatever is in it.

Nothing here is fatal: a file or a row that cannot be used is counted with its reason in the tally.
Files are streamed; a text above the limit is cut at a line end where there is one, else between two
characters, so memory does not grow with the size of a file or of a document.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from moebius.data.documents import Document, File, Tally, kind_of

BLOCK = 1 << 20
LINE_LIMIT = 64 << 20
TEXT_FIELDS = ("text", "content")
NEEDS_EXTRA = "needs the data extra: pip install 'moebius[data]'"


def read(file: File, tally: Tally, limit: int, piece: int | None = None) -> Iterator[Document]:
    """The documents of one file, each of at most `limit` bytes; `piece` cuts at blank lines."""
    readers = {"jsonl": _jsonl, "parquet": _parquet}
    kind = kind_of(file.path.name)
    try:
        if kind in readers:
            yield from readers[kind](file, tally, limit)
        else:
            yield from _plain(file, tally, limit, piece)
    except OSError:
        tally.skip("unreadable file", file.size)


# --- cutting --------------------------------------------------------------------------------------


def pieces(take: Callable[[int], bytes], limit: int, blank: bool = False) -> Iterator[bytes]:
    """Cut a stream of UTF-8 into pieces of at most `limit` bytes; together they are the stream."""
    buffer = b""
    while True:
        buffer += take(limit + 1 - len(buffer))
        if len(buffer) <= limit:
            if buffer:
                yield buffer
            return
        end = _cut(buffer, limit, blank)
        yield buffer[:end]
        buffer = buffer[end:]


def _cut(buffer: bytes, limit: int, blank: bool) -> int:
    """Where to end a piece: after the last blank line (beyond the half), the last line, or before
    the character that would cross the limit."""
    if blank:
        end = max(buffer.rfind(b"\n\n", 0, limit) + 2, buffer.rfind(b"\n\r\n", 0, limit) + 3)
        if end > limit // 2:
            return end
    end = buffer.rfind(b"\n", 0, limit) + 1
    if end:
        return end
    end = limit
    while buffer[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _documents(key: str, text: str, tally: Tally, limit: int) -> Iterator[Document]:
    """One text as a document, or as several where it is above the limit."""
    try:
        data = text.encode()
    except UnicodeEncodeError:
        tally.skip("text that is not valid Unicode", len(text))
        return
    if not text.strip():
        tally.skip("empty document", len(data))
    elif len(data) <= limit:
        yield Document(key, text, key)
    else:
        tally.split += 1
        for i, part in enumerate(pieces(io.BytesIO(data).read, limit)):
            yield Document(f"{key}~{i}", part.decode(), key)


# --- plain files ----------------------------------------------------------------------------------


def _plain(file: File, tally: Tally, limit: int, piece: int | None) -> Iterator[Document]:
    state = _scan(file.path)
    if state != "text":
        tally.skip(state, file.size)
        return
    if piece is None and file.size > limit:
        tally.split += 1
    with file.path.open("rb") as stream:
        if piece is None and file.size <= limit:
            yield Document(file.key, stream.read().decode(), file.key)
            return
        size, blank = (limit, False) if piece is None else (min(piece, limit), True)
        for i, part in enumerate(pieces(stream.read, size, blank)):
            key = f"{file.key}~{i}" if piece is None else f"{file.key}#{i}"
            yield Document(key, part.decode(), file.key if piece is None else key)


def _scan(path: Path) -> str:
    """`text`, or the reason why a plain file is of no use; found before any of it is used."""
    empty = True
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as stream:
            while block := stream.read(BLOCK):
                text = decoder.decode(block)
                empty = empty and not text.strip()
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "invalid UTF-8"
    return "empty document" if empty else "text"


# --- rows -----------------------------------------------------------------------------------------


def _jsonl(file: File, tally: Tally, limit: int) -> Iterator[Document]:
    damage = (EOFError, zlib.error, gzip.BadGzipFile, _Damaged)
    with closing(_open(file.path)) as stream:
        try:
            for number, line in enumerate(lines(stream)):
                yield from _row(f"{file.key}#{number}", line, tally, limit)
        except damage:
            tally.skip("damaged compressed file (rows before the damage kept)")


def _open(path: Path) -> io.BufferedIOBase:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(_Zstandard(path), BLOCK)
    return path.open("rb")


def lines(stream: io.BufferedIOBase, limit: int = LINE_LIMIT) -> Iterator[bytes | int]:
    """The lines of a stream; of one above `limit` bytes only its length."""
    while line := stream.readline(limit):
        if len(line) < limit or line.endswith(b"\n"):
            yield line
            continue
        length = len(line)
        while (more := stream.readline(BLOCK)) and not more.endswith(b"\n"):
            length += len(more)
        yield length + len(more)


def _row(key: str, line: bytes | int, tally: Tally, limit: int) -> Iterator[Document]:
    if isinstance(line, int):
        tally.skip(f"line above {LINE_LIMIT >> 20} MiB", line)
        return
    if not line.strip():
        return
    try:
        row: Any = json.loads(line.decode())
    except UnicodeDecodeError:
        tally.skip("invalid UTF-8", len(line))
        return
    except (ValueError, RecursionError):
        tally.skip("corrupt jsonl line", len(line))
        return
    text = (
        next((row[name] for name in TEXT_FIELDS if name in row), None)
        if isinstance(row, dict)
        else None
    )
    if not isinstance(text, str):
        tally.skip("row without text", len(line))
        return
    yield from _documents(key, text, tally, limit)


def _parquet(file: File, tally: Tally, limit: int) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{file.path.name} {NEEDS_EXTRA}") from error
    try:
        with parquet.ParquetFile(file.path) as table:
            name = next((name for name in TEXT_FIELDS if name in table.schema_arrow.names), None)
            if name is None:
                tally.skip("parquet file without text", file.size)
                return
            number = 0
            for batch in table.iter_batches(batch_size=64, columns=[name]):
                for value in batch.column(0):
                    text = _cell(value)
                    if isinstance(text, str):
                        yield from _documents(f"{file.key}#{number}", text, tally, limit)
                    else:
                        tally.skip("row without text" if text is None else "invalid UTF-8")
                    number += 1
    except pyarrow.ArrowException:
        tally.skip("damaged parquet file (rows before the damage kept)", file.size)


def _cell(value: Any) -> str | bytes | None:
    """A cell's text; None where it has none, its bytes where they are not UTF-8."""
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        return b""
    return text if isinstance(text, str) else None


# --- zstandard ------------------------------------------------------------------------------------


class _Damaged(Exception):
    """A zstandard stream that ends early or does not decode."""


class _Zstandard(io.RawIOBase):
    """A file of zstandard frames as a raw stream; a frame cut short raises, it does not end."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"{path.name} {NEEDS_EXTRA}") from error
        self._error = zstandard.ZstdError
        self._file = path.open("rb")
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()
        self._started = False
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame, self._started = self._new(), False
            self._input = self._input or self._file.read(4096)
            if not self._input:
                if self._started:
                    raise _Damaged
                return 0
            data, self._input, self._started = self._input, b"", True
            try:
                self._output = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise _Damaged from error
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
