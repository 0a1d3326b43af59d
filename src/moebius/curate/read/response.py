"""The page inside an HTTP response: its transfer and content encodings undone, within bounds.

What the headers claim is tried, not believed (RFC 9112, RFC 9110): a crawler may have undone an
encoding and left its header. A page cut short is kept as far as it decodes.
"""

import re

from moebius.curate.read import LIMIT
from moebius.curate.read.records import HEADER, parse_headers
from moebius.curate.read.streams import (
    GZIP,
    TOO_LARGE,
    TOO_MUCH,
    Damaged,
    Deflated,
    Frame,
    TooMuch,
    ZstandardFrame,
    inflate,
)

_STATUS = re.compile(rb"HTTP/\d(?:\.\d)?[ \t]+(\d{3})\b")
_BLANK = re.compile(rb"\r?\n\r?\n")
_CHUNK = re.compile(rb"(?:\r?\n)?[ \t]*([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]{0,1024})?\r?\n")
NOT_SUCCESS = "error or redirect page"
UNKNOWN_ENCODING = "unsupported content encoding"


class Unusable(Exception):
    """A response without a page; its text is the reason."""


def page_of(content: bytes) -> tuple[bytes, str]:
    """The page of a response and the type it claims. Raises Unusable with the reason."""
    headers: dict[str, str] = {}
    if content.startswith(b"HTTP/"):
        status = _STATUS.match(content)
        if status and not status[1].startswith(b"2"):
            raise Unusable(NOT_SUCCESS)
        blank = _BLANK.search(content, 0, HEADER)
        end = blank.end() if blank else len(content)
        headers = parse_headers(content[: blank.start() if blank else HEADER])
        content = content[end:]
    if "chunked" in headers.get("transfer-encoding", "").lower():
        content = unchunked(content)
    claimed = f"{headers.get('transfer-encoding', '')},{headers.get('content-encoding', '')}"
    names = [name.strip().lower() for name in claimed.split(",")]
    codings = [name for name in names if name not in ("", "chunked", "identity", "utf-8", "none")]
    try:
        for name in reversed(codings[:4]):
            content = decoded(content, name)
        if content.startswith(GZIP):
            content = decoded(content, "gzip")
    except TooMuch as error:
        raise Unusable(TOO_MUCH) from error
    if len(content) > LIMIT:
        raise Unusable(TOO_LARGE)
    return content, headers.get("content-type", "")


def unchunked(body: bytes) -> bytes:
    """The body without its chunks' sizes. Where it has none the rest is taken as it stands."""
    parts: list[bytes] = []
    at = 0
    while at < len(body):
        match = _CHUNK.match(body, at)
        if match is None:
            parts.append(body[at:])
            break
        size = int(match[1], 16)
        if size == 0:
            break
        parts.append(body[match.end() : match.end() + size])
        at = match.end() + size
    return b"".join(parts)


def decoded(body: bytes, name: str) -> bytes:
    """The body with one content encoding undone, or as it stands where it bears none of it."""
    frames: list[Frame] = []
    if name in ("gzip", "x-gzip"):
        frames = [Deflated()]
    elif name == "deflate":
        frames = [Deflated(15), Deflated(-15)]
    elif name == "zstd":
        frames = [ZstandardFrame("an encoding of a page")]
    elif name == "br":
        return _brotli(body)
    else:
        raise Unusable(UNKNOWN_ENCODING)
    return next((out for frame in frames if (out := inflate(frame, body, LIMIT))), body)


class _Brotli(Frame):
    """A brotli stream, by either of the packages that read it."""

    # A byte more may give a whole meta-block of 16 MiB more.
    STEP = 16

    def __init__(self) -> None:
        try:
            import brotli  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise Unusable(UNKNOWN_ENCODING) from error
        self._error = brotli.error
        self._stream = brotli.Decompressor()

    def take(self, data: bytes, most: int = 1 << 20) -> tuple[bytes, bytes]:
        try:
            return self._stream.process(data[: self.STEP]), data[self.STEP :]
        except self._error as error:
            raise Damaged from error

    @property
    def ended(self) -> bool:
        return self._stream.is_finished()


def _brotli(body: bytes) -> bytes:
    return inflate(_Brotli(), body, LIMIT) or body
