"""Near duplicates with known edits, planted among pieces of books that have nothing in common.

Each original has one copy, and the kinds of edit take turns; replaced and inserted words come from
all over the same texts, so that they are as frequent as words are.
"""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

PARAGRAPHS = 5
Edit = Callable[[list[str], list[str], random.Random], list[str]]


@dataclasses.dataclass(frozen=True)
class Planted:
    """A document: the number of its original, and how it differs from it (empty: it is one)."""

    source: int
    edit: str
    text: str


def _replaced(share: float) -> Edit:
    def edit(words: list[str], all_words: list[str], draw: random.Random) -> list[str]:
        words = list(words)
        for index in draw.sample(range(len(words)), round(share * len(words))):
            words[index] = draw.choice(all_words)
        return words

    return edit


def _inserted(share: float) -> Edit:
    """One run of foreign words, as an advertisement stands in a page."""

    def edit(words: list[str], all_words: list[str], draw: random.Random) -> list[str]:
        count, at = round(share * len(words)), draw.randrange(len(words) + 1)
        start = draw.randrange(len(all_words) - count)
        return words[:at] + all_words[start : start + count] + words[at:]

    return edit


def _reordered(words: list[str], all_words: list[str], draw: random.Random) -> list[str]:
    size = -(-len(words) // PARAGRAPHS)
    paragraphs = [words[start : start + size] for start in range(0, len(words), size)]
    draw.shuffle(paragraphs)
    return [word for paragraph in paragraphs for word in paragraph]


EDITS: dict[str, Edit] = {
    "nothing changed": _replaced(0.0),
    **{f"{share}% of words replaced": _replaced(share / 100) for share in (1, 5, 10, 20, 40)},
    **{f"{share}% inserted": _inserted(share / 100) for share in (10, 25)},
    "paragraphs reordered": _reordered,
}


def planted(folder: Path, originals: int, words: int, seed: int) -> list[Planted]:
    """Originals of so many words from the .txt files of a folder and as many copies, shuffled."""
    files = sorted(folder.glob("*.txt"))
    all_words = [word for file in files for word in file.read_text(encoding="utf-8").split()]
    pieces = len(all_words) // words
    if pieces < originals:
        raise ValueError(f"{folder} has {pieces} pieces of {words} words, not {originals}")
    draw = random.Random(seed)
    found: list[Planted] = []
    kinds = list(EDITS)
    for source, piece in enumerate(draw.sample(range(pieces), originals)):
        own = all_words[piece * words : (piece + 1) * words]
        kind = kinds[source % len(kinds)]
        copy = EDITS[kind](own, all_words, draw)
        found.append(Planted(source, "", " ".join(own)))
        found.append(Planted(source, kind, " ".join(copy)))
    draw.shuffle(found)
    return found
