"""Labelled examples from real texts: prose against word salad, code, and boilerplate of pages."""

import functools
import gzip
import html
import json
import random
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import pytest

from moebius.curate.scorers.train import Example

DATA = Path(__file__).resolve().parents[3] / "../shared/data"


@functools.cache
def books() -> tuple[str, ...]:
    """The English novels, in order of their names."""
    folder = DATA / "text" / "en"
    if not folder.is_dir():
        pytest.skip(f"there are no books in {folder}")
    return tuple(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))


def pieces(text: str, size: int, most: int) -> list[str]:
    """The first `most` pieces of about `size` characters, of whole lines."""
    found, held = [], ""
    for line in text.splitlines(keepends=True):
        if held and len(held) + len(line) > size:
            found.append(held)
            held = ""
        held += line
    return [piece for piece in [*found, held] if len(piece) > size // 4][:most]


def prose(chosen: Iterable[str], most: int) -> list[Example]:
    return [(piece, "prose") for book in chosen for piece in pieces(book, 2000, most)]


def salad(examples: list[Example]) -> list[Example]:
    """Every second example with its words in random order."""
    chance = random.Random(0)
    mixed: list[Example] = []
    for i, (text, label) in enumerate(examples):
        parts = text.split()
        chance.shuffle(parts)
        mixed.append((" ".join(parts), "salad") if i % 2 else (text, label))
    return mixed


def code(every: slice, most: int) -> list[Example]:
    """Pieces of the standard library's modules."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[every]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return [(piece, "code") for text in texts for piece in pieces(text, 2000, most)]


def articles(part: slice) -> list[Example]:
    """Gold articles of web pages, and the other lines of the same pages."""
    folder = DATA / "web" / "article-extraction-benchmark"
    if not folder.is_dir():
        pytest.skip(f"there are no pages in {folder}")
    gold = json.loads((folder / "ground-truth.json").read_text(encoding="utf-8"))
    found: list[Example] = []
    for name in sorted(gold)[part]:
        body = gold[name]["articleBody"]
        raw = gzip.decompress((folder / "html" / f"{name}.html.gz").read_bytes())
        page = raw.decode("utf-8", "replace")
        page = re.sub(r"(?is)<(script|style|noscript)\b.*?</\1>", "", page)
        lines = (" ".join(line.split()) for line in html.unescape(_untagged(page)).splitlines())
        rest = "\n".join(line for line in lines if line and line not in body)
        found += [(piece, "article") for piece in pieces(body, 600, 20)]
        found += [(piece[:3000], "boilerplate") for piece in pieces(rest, 600, 12)]
    return found


def _untagged(page: str) -> str:
    page = re.sub(r"(?i)</?(?:p|div|li|ul|h\d|tr|td|br|section|article|nav)\b[^>]*>", "\n", page)
    return re.sub(r"<[^>]*>", "", page)
