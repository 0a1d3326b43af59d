"""Files as streams of bounded blocks, compressed or not: no input makes memory grow.

What a file is compressed with is told by its first bytes, never by its name. gzip members and
zstandard frames are met one by one, so that a reader may know where one begins (RFC 1952; RFC 8878;
the dictionary frame of .warc.zst after IIPC's "WARC compression with Zstandard 1.0") and go on
behind a damaged one.
"""

import io
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moebius.curate.read import LIMIT

GZIP, ZSTD, DICTIONARY = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\x5d\x2a\x4d\x18"
ENDINGS = ("", ".gz", ".zst")
DAMAGED = "damaged compressed file"
TOO_MUCH = "decompresses to more than the limit"
TOO_LARGE = f"document above {LIMIT >> 20} MiB"
NEEDS_EXTRA = "needs the curate extra: pip install 'moebius[curate]'"
BLOCK = 1 << 16
RAW = 8 << 10
# A stream above `FREE` bytes that grew by more than `RATIO` is no text but a bomb.
FREE, RATIO = 16 * LIMIT, 100
# What a search for the next sound member may cost: so many tries, so many bytes looked at again.
TRIES, BACK, HEAD = 1000, 1 << 20, 160 << 10


class Damaged(Exception):
    """Compressed data that ends early or does not decode."""


class TooMuch(Exception):
    """Compressed data that swells beyond any text's measure."""


class Frame(ABC):
    """One gzip member or zstandard frame, decompressed step by step."""

    @abstractmethod
    def take(self, data: bytes, most: int = 1 << 20) -> tuple[bytes, bytes]:
        """Decompress the beginning of `data`: some output, and the rest of `data`."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether the frame is complete."""


class Deflated(Frame):
    """A stream of zlib: a gzip member by default, other wrappers by `wbits`."""

    # What is fed at once is lost where it is damaged.
    STEP = 1024

    def __init__(self, wbits: int = 31) -> None:
        self._zlib = zlib.decompressobj(wbits)

    def take(self, data: bytes, most: int = 1 << 20) -> tuple[bytes, bytes]:
        try:
            out = self._zlib.decompress(data[: self.STEP], most)
        except zlib.error as error:
            raise Damaged from error
        left = self._zlib.unused_data if self._zlib.eof else self._zlib.unconsumed_tail
        return out, left + data[self.STEP :]

    @property
    def ended(self) -> bool:
        return self._zlib.eof


class ZstandardFrame(Frame):
    """A zstandard frame. 4 bytes give up to 128 KiB, so it is fed few at a time."""

    STEP = 256

    def __init__(self, what: str, dictionary: bytes = b"") -> None:
        zstandard = import_zstandard(what)
        self._error = zstandard.ZstdError
        known = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
        self._frame = zstandard.ZstdDecompressor(dict_data=known).decompressobj()

    def take(self, data: bytes, most: int = 1 << 20) -> tuple[bytes, bytes]:
        rest = data[self.STEP :]
        try:
            out = self._frame.decompress(data[: self.STEP])
        except self._error as error:
            raise Damaged from error
        return out, self._frame.unused_data + rest if self._frame.eof else rest

    @property
    def ended(self) -> bool:
        return self._frame.eof


def import_zstandard(what: str) -> Any:
    """The optional package. Raises ValueError where it is not installed."""
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f"{what} {NEEDS_EXTRA}") from error
    return zstandard


def inflate(frame: Frame, data: bytes, limit: int) -> bytes:
    """What `data` decompresses to, as far as it decodes. Raises TooMuch above `limit` bytes."""
    parts: list[bytes] = []
    size = 0
    while data and not frame.ended:
        try:
            out, data = frame.take(data)
        except Damaged:
            break
        parts.append(out)
        size += len(out)
        if size > limit:
            raise TooMuch
    return b"".join(parts)


class Members:
    """The content of a file, block by block. `fresh`: the last block was the first of a member;
    `given_up`: bytes not looked at because those before them are damaged throughout."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._input, self._begun, self._pending = b"", 0, False
        self._frame: Frame | None = None
        self._resumed = 0
        self.fresh, self.given_up = False, 0
        head = self._file.peek(4)[:4]
        self._magic = next((m for m in (GZIP, ZSTD, DICTIONARY) if head.startswith(m)), b"")
        self._new: Callable[[], Frame] | None = None
        try:
            self._new = self._codec(path.name)
        except (Damaged, TooMuch, ValueError):
            self._file.close()
            raise

    def _codec(self, name: str) -> Callable[[], Frame] | None:
        if self._magic == GZIP:
            return Deflated
        dictionary = b""
        if self._magic == DICTIONARY:
            size = int.from_bytes(self._file.read(8)[4:], "little")
            dictionary = self._file.read(min(size, LIMIT + 1))
            if dictionary.startswith(ZSTD):
                dictionary = inflate(ZstandardFrame(name), dictionary, LIMIT)
            if len(dictionary) > LIMIT:
                raise TooMuch
            self._magic = ZSTD
        return (lambda: ZstandardFrame(name, dictionary)) if self._magic else None

    @property
    def compressed(self) -> bool:
        return self._new is not None

    @property
    def position(self) -> int:
        """Bytes of the file used so far."""
        return self._file.tell() - len(self._input)

    def block(self) -> bytes:
        """Some bytes of content; none at the end. Raises Damaged; `resume` may help then."""
        if self._new is None:
            self.fresh = False
            return self._file.read(BLOCK)
        out = b""
        while not out or (self._pending and self._frame is not None and len(out) < 16):
            if not self._input:
                self._input = self._file.read(RAW)
            if self._frame is None:
                if self._magic == GZIP:
                    self._input = self._input.lstrip(b"\0")
                    if not self._input and self._file.peek(1):
                        continue
                if not self._input:
                    break
                self._begun, self._pending = self.position, True
                self._frame = self._new()
            if not self._input:
                self._frame = None
                raise Damaged
            more, self._input = self._frame.take(self._input)
            out += more
            if self._frame.ended:
                self._frame = None
        self.fresh, self._pending = self._pending, False
        return out

    @property
    def unbegun(self) -> bool:
        """Whether nothing of the present member was given yet."""
        return self._pending

    def resume(self, mark: bytes) -> bool:
        """Go on at the next member whose content begins with `mark`; False if none is found."""
        start = max(self._begun + 1, self.position - BACK)
        self._frame, self._input, self._pending = None, b"", False
        self._resumed += 1
        for tries, offset in enumerate(self._candidates(start)):
            if tries == TRIES or self._resumed > TRIES:
                self.given_up = self._file.seek(0, io.SEEK_END) - offset
                return False
            self._file.seek(offset)
            if self._content_begins(mark):
                self._file.seek(offset)
                return True
        self._file.seek(0, io.SEEK_END)
        return False

    def _candidates(self, start: int) -> Iterator[int]:
        """Where from `start` on the file's magic bytes stand."""
        while True:
            self._file.seek(start)
            data = self._file.read(BLOCK)
            at = data.find(self._magic)
            while at >= 0:
                yield start + at
                at = data.find(self._magic, at + 1)
            if len(data) < BLOCK:
                return
            start += len(data) - len(self._magic) + 1

    def _content_begins(self, mark: bytes) -> bool:
        assert self._new is not None
        frame, out, fed = self._new(), b"", 0
        while len(out) < len(mark) and fed < HEAD and (data := self._file.read(RAW)):
            fed += len(data)
            while data and len(out) < len(mark) and not frame.ended:
                try:
                    more, data = frame.take(data, BLOCK)
                except Damaged:
                    return False
                out += more
            if frame.ended:
                break
        return out.startswith(mark)

    def close(self) -> None:
        self._file.close()


class Unpacked(io.RawIOBase):
    """The content of a file as a raw stream; damage raises Damaged, a bomb raises TooMuch."""

    def __init__(self, path: Path) -> None:
        self._members = Members(path)
        self._left, self._total = memoryview(b""), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = memoryview(self._members.block())
            self._total += len(self._left)
            if self._members.compressed and self._total > FREE + RATIO * self._members.position:
                raise TooMuch
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._members.close()
        super().close()


def unpack(path: Path) -> io.BufferedReader:
    """The content of a file, decompressed. Raises OSError, and while reading Damaged, TooMuch."""
    return io.BufferedReader(Unpacked(path), BLOCK)
