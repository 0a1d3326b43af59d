"""A corpus of web pages for a benchmark: real pages, multiplied in other words, as WARC files."""

import gzip
import random
import re
import uuid
from collections.abc import Sequence
from pathlib import Path

_MARKUP = re.compile(
    rb"(<(?:script|style)\b.*?</(?:script|style)\s*>|<!--.*?-->|<[^>]*>)", re.DOTALL | re.IGNORECASE
)
_WORD = re.compile(rb"(?<![&\w\x80-\xff])[a-z]{5,}(?![\w\x80-\xff])")

# A page that all rules keep, for the time that the start takes.
_PLAIN = (
    "The old mill stands at the end of the valley, where two streams meet below the chapel.",
    "For three hundred years farmers brought their grain to it and carried flour back home.",
    "When the railway came, most of that trade went to larger works on the coast.",
    "The last miller kept the wheel turning with his sons until the great flood of that spring.",
    "Since then a small society of neighbours has repaired the roof, the gears and both stones.",
    "Visitors can see how they work on summer evenings, and taste bread that is baked beside them.",
    "Whoever wants to help is welcome to write to the warden, who lives across the bridge.",
)


def read_pages(folder: Path) -> list[bytes]:
    """The .html and .html.gz files of a folder, sorted by name."""
    files = sorted(p for p in folder.glob("*") if p.name.endswith((".html", ".html.gz")))
    if not files:
        raise ValueError(f"{folder} has no .html or .html.gz file")
    return [
        gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for path in files
    ]


def plain_page() -> bytes:
    """A short page of good English."""
    paragraphs = "".join(f"<p>{sentence}</p>" for sentence in _PLAIN)
    return f"<html><body><h1>The mill</h1><article>{paragraphs}</article></body></html>".encode()


def varied(pages: Sequence[bytes], copies: int) -> list[bytes]:
    """The pages and, per further copy, the same pages in other words, so that none is a duplicate.

    In a copy each lower-case word of five letters or more stands for another of its length: what
    rules count (lines, marks, stop words, repeated words and letters) stays as it is.
    """
    vocabulary: dict[int, set[bytes]] = {}
    for page in pages:
        for text in _MARKUP.split(page)[::2]:
            for word in _WORD.findall(text):
                vocabulary.setdefault(len(word), set()).add(word)
    found = list(pages)
    for copy in range(1, copies):
        draw = random.Random(copy)
        swap: dict[bytes, bytes] = {}
        for words in map(sorted, vocabulary.values()):
            swap.update(zip(words, draw.sample(words, len(words)), strict=True))
        found += [_in_other_words(page, swap) for page in pages]
    return found


def _in_other_words(page: bytes, swap: dict[bytes, bytes]) -> bytes:
    parts = _MARKUP.split(page)
    parts[::2] = [_WORD.sub(lambda word: swap[word[0]], text) for text in parts[::2]]
    return b"".join(parts)


def write_warcs(folder: Path, pages: Sequence[bytes], files: int) -> None:
    """Pages in turns over so many .warc.gz, with the headers that readers want to see."""
    folder.mkdir(parents=True)
    for file in range(files):
        with (folder / f"{file:03d}.warc.gz").open("wb") as stream:
            for number in range(file, len(pages), files):
                stream.write(gzip.compress(_record(number, pages[number]), mtime=0))


def _record(number: int, page: bytes) -> bytes:
    """The page as the answer of a server, its type named: datatrove drops what it cannot guess."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page
    headers = {
        "WARC-Type": "response",
        "WARC-Record-ID": f"<urn:uuid:{uuid.UUID(int=number)}>",
        "WARC-Target-URI": f"https://site.example/{number}",
        "WARC-Date": "2026-01-01T00:00:00Z",
        "WARC-Identified-Payload-Type": "text/html",
        "Content-Type": "application/http; msgtype=response",
        "Content-Length": str(len(answer)),
    }
    lines = ["WARC/1.0", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + answer + b"\r\n\r\n"
