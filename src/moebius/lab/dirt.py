"""A clean corpus made dirty at known shares, so that what curation does can be judged.

Pages are cut from clean texts; boilerplate lines are put round some, some are repeated (exactly or
with a few words changed), and pages of gibberish and of another language are mixed in. The `id` of
a row says what it is, so every step's misses and victims can be counted.
"""

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path

from moebius.data.documents import Tally, open_corpus
from moebius.data.readers import read
from moebius.data.shards import write_aside

# What a page can be; the prefix of its id.
KINDS = ("clean", "copy", "near", "gibberish", "foreign")
_SITES = 20
_LIMIT = 16 << 20


@dataclasses.dataclass(frozen=True)
class Dirt:
    """How much of each kind of dirt; shares are of the clean pages."""

    words: int = 300
    boilerplate: float = 0.5
    copies: float = 0.4
    near_copies: float = 0.3
    gibberish: float = 0.3
    foreign: float = 0.3
    # Share of the words of a near copy that differ.
    edits: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        shares = (self.boilerplate, self.copies, self.near_copies, self.gibberish, self.foreign)
        if self.words < 20 or min(shares) < 0 or not 0 <= self.edits <= 1:
            raise ValueError("words must be at least 20, shares not negative, edits within 0 and 1")


def soil(clean: Path, foreign: Path | None, out: Path, dirt: Dirt | None = None) -> dict[str, int]:
    """Write the dirtied corpus as JSON lines (`id`, `text`, `url`); the number of pages by kind.

    `clean` and `foreign` are files or folders that training reads. Raises ValueError where one has
    no text, or `foreign` is not given and its share is not 0.
    """
    dirt = dirt or Dirt()
    drawn = random.Random(dirt.seed)
    pages = list(_pages(clean, dirt.words))
    rows = [("clean", _with_boilerplate(page, dirt, drawn)) for page in pages]
    rows += [("copy", drawn.choice(rows)[1]) for _ in range(round(dirt.copies * len(pages)))]
    near = round(dirt.near_copies * len(pages))
    rows += [("near", _edited(drawn.choice(pages), dirt.edits, drawn)) for _ in range(near)]
    count = round(dirt.gibberish * len(pages))
    rows += [("gibberish", _gibberish(dirt.words, drawn)) for _ in range(count)]
    count = round(dirt.foreign * len(pages))
    if count and foreign is None:
        raise ValueError("name a text of another language, or set its share to 0")
    others = list(_pages(foreign, dirt.words)) if count and foreign is not None else []
    rows += [("foreign", drawn.choice(others)) for _ in range(count)]
    drawn.shuffle(rows)
    lines = []
    for number, (kind, text) in enumerate(rows):
        url = f"https://site{number % _SITES}.example/{number}"
        lines.append(json.dumps({"id": f"{kind}-{number}", "text": text, "url": url}))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_aside(out, ("\n".join(lines) + "\n").encode())
    return {kind: sum(1 for k, _ in rows if k == kind) for kind in KINDS}


def texts_of(place: Path) -> Iterator[str]:
    """The texts of a file or folder that training reads, in order."""
    corpus = open_corpus(str(place))
    for file in corpus.files:
        for document in read(file, Tally(), _LIMIT):
            yield document.text


def _pages(place: Path, num_words: int) -> Iterator[str]:
    """Whole paragraphs up to about `num_words`."""
    for text in texts_of(place):
        page: list[str] = []
        length = 0
        for paragraph in text.split("\n\n"):
            page.append(paragraph)
            # Texts without spaces have characters for words.
            length += max(len(paragraph.split()), len(paragraph) // 8)
            if length >= num_words:
                yield "\n\n".join(page)
                page, length = [], 0


def _with_boilerplate(page: str, dirt: Dirt, drawn: random.Random) -> str:
    if drawn.random() >= dirt.boilerplate:
        return page
    site = drawn.randrange(_SITES)
    head = [
        f"Site {chr(65 + site)} - home of good reading",
        "Home | News | Forum | Shop | About us | Contact",
        "Sign in or create a free account to continue",
    ]
    foot = [
        "Share this page on your favourite network",
        "We use cookies to improve your experience. Accept all or manage your settings.",
        f"Read more stories like this one on Site {chr(65 + site)}",
        "Subscribe to our newsletter and never miss an update",
        f"Copyright Site {chr(65 + site)}. All rights reserved.",
    ]
    return "\n".join([*head, page, *foot])


def _edited(page: str, share: float, drawn: random.Random) -> str:
    words = page.split(" ")
    for i in range(len(words)):
        if drawn.random() < share:
            words[i] = drawn.choice(("something", "perhaps", "indeed", "never", "quite", "also"))
    return " ".join(words)


def _gibberish(num_words: int, drawn: random.Random) -> str:
    """One of three: letters at random, symbols and numbers, one phrase over and over."""
    kind = drawn.randrange(3)
    if kind == 0:
        letters = "abcdefghijklmnopqrstuvwxyz"
        lengths = [drawn.randint(2, 14) for _ in range(num_words)]
        return " ".join("".join(drawn.choices(letters, k=length)) for length in lengths)
    if kind == 1:
        tokens = ("#", "...", "|", "//", "0x", "==", "%", "--")
        rows = [f"{drawn.choice(tokens)} {drawn.randrange(10**6)}" for _ in range(num_words)]
        return " ".join(rows)
    phrase = " ".join(drawn.choices(("buy", "cheap", "now", "best", "online", "deal"), k=5))
    return "\n".join([phrase] * (num_words // 5))
