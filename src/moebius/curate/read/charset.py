"""The encoding of a plain file, found in one bounded pass; then its content as UTF-8.

UTF-8, UTF-16 and UTF-32 by their mark, UTF-8 without one, else Windows-1252 with the five bytes it
leaves undefined taken as control characters, as browsers do (WHATWG Encoding Standard). A file of
UTF-8 with few invalid bytes stays UTF-8, those bytes becoming U+FFFD.
"""

import codecs
import io
from dataclasses import dataclass
from typing import Any, BinaryIO

from moebius.curate.read.sniff import control_share
from moebius.curate.read.streams import BLOCK

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_UNDEFINED = {0x81, 0x8D, 0x8F, 0x90, 0x9D}
_WINDOWS = "".join(chr(i) if i in _UNDEFINED else bytes([i]).decode("cp1252") for i in range(256))
BINARY = "binary file"
BINARY_SHARE = 0.01


@dataclass(frozen=True)
class Charset:
    """What a pass over a file found. `reason` says why it is no text, where it is none."""

    encoding: str
    reason: str
    num_bytes: int


def survey(stream: BinaryIO) -> Charset:
    """Read a stream to its end and tell what it is encoded in."""
    block = stream.read(BLOCK)
    encoding = next((name for mark, name in MARKS if block.startswith(mark)), "utf-8")
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    size, control, invalid, beyond, blank = 0, 0.0, 0, 0, True
    while True:
        text = decoder.decode(block, final=not block)
        size += len(block)
        if block:
            wide = encoding in ("utf-16", "utf-32")
            control += control_share(text.encode() if wide else block) * len(block)
        if not text.isascii():
            wrong = text.count("\ufffd") - block.count(b"\xef\xbf\xbd")
            invalid += max(0, wrong)
            beyond += len(text) - len(text.encode("ascii", "ignore"))
        blank = blank and not text.strip()
        if not block:
            break
        block = stream.read(BLOCK)
    if encoding == "utf-8" and beyond - invalid < 10 * invalid:
        encoding = "windows-1252"
    reason = "empty document" if blank else BINARY if control > BINARY_SHARE * size else ""
    return Charset(encoding, reason, size)


class _Recoded(io.RawIOBase):
    """A stream decoded and encoded again as valid UTF-8. Closing it closes the stream."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream, self._left, self._done = stream, memoryview(b""), False
        self._decoder: codecs.IncrementalDecoder | None = None
        if encoding != "windows-1252":
            self._decoder = codecs.getincrementaldecoder(encoding)("replace")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left and not self._done:
            block = self._stream.read(BLOCK)
            self._done = not block
            if self._decoder is None:
                text = codecs.charmap_decode(block, "strict", _WINDOWS)[0]  # pyright: ignore
            else:
                text = self._decoder.decode(block, final=self._done)
            self._left = memoryview(text.encode())
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def recoded(stream: BinaryIO, charset: Charset) -> io.BufferedReader:
    """The same content as UTF-8."""
    return io.BufferedReader(_Recoded(stream, charset.encoding), BLOCK)
