"""Drops documents by their address: listed domains, listed addresses, words in the address.

The rules are RefinedWeb's (appendix G.1): a domain stands for all below it; an address for all
pages under it; `parts` match anywhere, `words` as whole words, of `soft_words` two must be found.
All lists are files of the user's, plain or gzip, one entry a line, `#` begins a comment.
"""

import dataclasses
import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path

import numpy as np

from moebius.curate.addresses import LONGEST, Address, split_address, without_www
from moebius.curate.document import Document, Dropped
from moebius.curate.step import Decide, Decision, Filter
from moebius.curate.text import hash_of, hashes_of

_WORD = re.compile(r"[^\W_]+")
_PLAIN_DOMAIN = re.compile(r"[a-z0-9][a-z0-9.\-]*[a-z0-9]")
_COMMENT = re.compile(r"(?:^|\s)#.*")
_BLOCK = 1 << 18


@dataclasses.dataclass(frozen=True)
class UrlList(Filter):
    """Block lists for addresses. Documents without an address pass.

    `domains`: `example.org` and what is below it. `addresses`: `example.org/shop` and what is under
    it. `parts`, `words`, `soft_words`: texts in the address, of whose last kind `soft_limit`
    different ones are needed.
    """

    domains: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    soft_words: tuple[str, ...] = ()
    soft_limit: int = 2

    def __post_init__(self) -> None:
        if self.soft_limit < 1:
            raise ValueError(f"soft_limit is a number of words, 1 or more, not {self.soft_limit}")

    def build(self) -> Decide:
        lists = [self.domains, self.addresses, self.parts, self.words, self.soft_words]
        if not any(lists):
            raise ValueError("url_list names no list; set domains, addresses, parts or words")
        domains = _hashes(self.domains, _as_domain)
        addresses = _hashes(self.addresses, _as_address)
        parts = _Parts(_entries(self.parts))
        words = _entries(self.words)
        soft = _entries(self.soft_words)

        def decide(document: Document) -> Decision:
            address = split_address(document.url)
            if not address.host:
                return document
            if found := _first(domains, _domains_above(address.host)):
                return Dropped("listed domain", found)
            if len(addresses) and (found := _first(addresses, _addresses_above(address))):
                return Dropped("listed address", found)
            text = document.url[:LONGEST].lower()
            if found := parts.first_in(text):
                return Dropped("listed word in address", found)
            if words or soft:
                present = set(_WORD.findall(text))
                if found := min(words & present, default=""):
                    return Dropped("listed word in address", found)
                hits = soft & present
                if len(hits) >= self.soft_limit:
                    return Dropped("several suspect words in address", " ".join(sorted(hits)))
            return document

        return decide


class _Parts:
    """Texts to be found anywhere: by length, so that many cost no more than few."""

    def __init__(self, parts: frozenset[str]) -> None:
        self._parts = parts
        self._lengths = sorted({len(part) for part in parts})

    def first_in(self, text: str) -> str:
        """A listed text that `text` contains, the leftmost of the shortest; else an empty one."""
        for length in self._lengths:
            for start in range(len(text) - length + 1):
                if text[start : start + length] in self._parts:
                    return text[start : start + length]
        return ""


def read_list(path: str) -> Iterator[list[str]]:
    """The entries of a list, plain or gzip, some thousands at a time, comments left out.

    Raises ValueError where the list is not there, cannot be read or has no entry.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there is no list {path}; name a file of one entry a line")
    empty = True
    try:
        with file.open("rb") as start:
            packed = start.read(2) == b"\x1f\x8b"
        with gzip.open(file) if packed else file.open("rb") as data:
            for text in _whole_lines(data, path):
                lines = text.split("\n")
                if "#" in text:
                    lines = [_COMMENT.sub("", line) for line in lines]
                entries = [entry for line in lines if (entry := line.strip())]
                empty = empty and not entries
                yield entries
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"the list {path} cannot be read: {error}") from error
    if empty:
        raise ValueError(f"the list {path} has no entry; write one a line")


def _whole_lines(data: BufferedIOBase, path: str) -> Iterator[str]:
    """The text in blocks that end with a line."""
    rest = b""
    while block := data.read(_BLOCK):
        head, newline, tail = (rest + block).rpartition(b"\n")
        if len(tail) >= _BLOCK:
            raise ValueError(f"the list {path} has a line too long; write one entry a line")
        if newline:
            yield head.decode("utf-8", "replace")
        rest = tail
    yield rest.decode("utf-8", "replace")


def _entries(paths: tuple[str, ...]) -> frozenset[str]:
    """All entries of some lists, in lower case."""
    return frozenset(e.lower() for path in paths for entries in read_list(path) for e in entries)


def _hashes(paths: tuple[str, ...], form: Callable[[str], str]) -> np.ndarray:
    """The sorted hashes of all entries: 8 bytes each, where sets of texts would take a hundred."""
    found = [np.zeros(0, np.uint64)]
    for path in paths:
        for entries in read_list(path):
            found.append(hashes_of([shaped for entry in entries if (shaped := form(entry))]))
    return np.unique(np.concatenate(found))


def _first(hashes: np.ndarray, candidates: list[str]) -> str:
    if not len(hashes):
        return ""
    for candidate in candidates:
        value = np.uint64(hash_of(candidate))
        index = int(np.searchsorted(hashes, value))
        if index < len(hashes) and hashes[index] == value:
            return candidate
    return ""


def _as_domain(entry: str) -> str:
    """A line of a domain list, or of a hosts file (`0.0.0.0 example.org`), as a host."""
    if _PLAIN_DOMAIN.fullmatch(entry):
        return without_www(entry)
    host = entry.split()[-1].removeprefix("*").strip(".")
    return without_www(split_address(host if "//" in host else "//" + host).host)


def _as_address(entry: str) -> str:
    address = split_address(entry if "//" in entry else "//" + entry)
    query = "?" + address.query if address.query else ""
    return without_www(address.host) + address.path.rstrip("/") + query if address.host else ""


def _domains_above(host: str) -> list[str]:
    labels = host.split(".")
    return [".".join(labels[start:]) for start in range(len(labels))]


def _addresses_above(address: Address) -> list[str]:
    """The address itself and what it lies under, cut at its slashes."""
    host = without_www(address.host)
    path = address.path.rstrip("/")
    cuts = [host + path[: match.start()] for match in re.finditer("/", path)]
    query = [f"{host}{path}?{address.query}"] if address.query else []
    return [*cuts, host + path, *query]
