"""Decontamination: all items of four benchmarks planted in books, and rules against brute force."""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.curate.benchmarks import Benchmark, Item, items
from moebius.curate.document import Document, Dropped
from moebius.curate.step import Decide
from moebius.curate.steps.decontaminate import Decontaminate, checkable

DATA = Path(__file__).resolve().parents[3] / "../shared/data"
FIELDS = {
    "gsm8k/test.jsonl": ("question", "answer"),
    "humaneval": ("prompt", "canonical_solution"),
    "ifeval": ("prompt",),
    "mmlu": ("question", "question+choices"),
}


@functools.cache
def real() -> tuple[Decontaminate, Decide]:
    """The step with the four benchmarks, and its decision."""
    if not (DATA / "eval").is_dir():
        pytest.skip(f"there are no benchmarks in {DATA}")
    named = tuple(Benchmark(str(DATA / "eval" / name), fields=f) for name, f in FIELDS.items())
    step = Decontaminate(benchmarks=named)
    return step, step.build()


@functools.cache
def books() -> tuple[list[str], ...]:
    folder = DATA / "text" / "en"
    if not folder.is_dir():
        pytest.skip(f"there are no books in {folder}")
    return tuple(path.read_text("utf-8").split(" ") for path in sorted(folder.glob("*.txt")))


def words_of(text: str) -> list[str]:
    """Runs of letters and digits: enough to count words in these benchmarks."""
    return regex.findall(r"[^\W_]+", text.replace("'", ""))


def respaced(text: str, draw: random.Random) -> str:
    return "".join(draw.choice([" ", "  ", "\n", "\t", " \n "]) if c.isspace() else c for c in text)


def recased(text: str, draw: random.Random) -> str:
    return draw.choice([text.upper(), text.lower(), text.title()])


def repunctuated(text: str, draw: random.Random) -> str:
    """Typographic quotes and dashes, punctuation gone or doubled, words divided at line ends."""
    text = text.replace("'", "\u2019").replace('"', "\u201c").replace("...", "\u2026")
    text = text.replace(",", draw.choice(["", " ,", ";"])) if ", " in text else text
    marked = [f"*{word}*" if draw.random() < 0.1 else word for word in text.split(" ")]
    long = [
        i for i, word in enumerate(marked) if word.isalpha() and word.isascii() and len(word) > 5
    ]
    for index in draw.sample(long, min(2, len(long))):
        word = marked[index]
        marked[index] = word[:3] + draw.choice(["-\n", "\u00ad", "\u2010\n  "]) + word[3:]
    return " ".join(marked)


def rehyphenated(text: str, draw: random.Random) -> str:
    return text.replace("-", draw.choice(["", " ", "\u2010", "-\n"]))


PLANTS: dict[str, Callable[[str, random.Random], str]] = {
    "verbatim": lambda text, draw: text,
    "respaced": respaced,
    "recased": recased,
    "repunctuated": repunctuated,
    "rehyphenated": rehyphenated,
}


def planted(item: Item, plant: str, draw: random.Random) -> str:
    """A page of a book with the item in the middle of a sentence; empty if it has under 8 words."""
    counts = {part: len(words_of(part)) for part in item.parts}
    part = next((p for p in item.parts if counts[p] >= 13), item.parts[-1])
    if counts[part] < 8:
        return ""
    book = draw.choice(books())
    start = draw.randrange(len(book) - 120)
    before, after = (" ".join(book[at : at + 60]) for at in (start, start + 60))
    return " ".join([before, PLANTS[plant](part, draw), after])


def test_every_planted_item_is_found() -> None:
    """All items of all benchmarks; the ways to plant them take turns."""
    step, decide = real()
    draw, count, missed = random.Random(0), 0, []
    every = [item for benchmark in step.benchmarks for item in items(benchmark)]
    for number, item in enumerate(every):
        plant = list(PLANTS)[number % len(PLANTS)]
        if page := planted(item, plant, draw):
            count += 1
            if not isinstance(decide(Document("page", page)), Dropped):
                missed.append((item.name, plant, page))
    assert len(every) - 10 < count < len(every)
    assert not missed, f"{len(missed)} of {count}: {missed[:3]}"


def test_clean_books_are_left_alone() -> None:
    _, decide = real()
    pages = [book[i : i + 5000] for book in books() for i in range(0, len(book), 5000)]
    hits = [d for page in pages if isinstance(d := decide(Document("p", " ".join(page))), Dropped)]
    assert [hit.detail for hit in hits] == []


def test_items_that_cannot_be_found_are_listed() -> None:
    step, _ = real()
    for benchmark, one in zip(step.benchmarks, checkable(step), strict=True):
        assert one.benchmark == benchmark.title
        every = list(items(benchmark))
        short = [i.name for i in every if max(len(words_of(p)) for p in i.parts) < 8]
        assert one.by_grams + one.only_whole + len(one.uncheckable) == len(every)
        assert {line.partition(":")[0] for line in one.uncheckable} <= set(short)
        assert len(one.uncheckable) < 5


# --- rules, on few words --------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["aa", "bb", "cc"]), max_size=14)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


def built(folder: Path, parts: list[str], benchmark: Benchmark) -> Decide:
    lines = [json.dumps({"text": part}) for part in parts]
    (folder / "items.jsonl").write_text("\n".join(lines))
    return Decontaminate(benchmarks=(benchmark,), length=4, shortest=3).build()


def runs(words: list[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(WORDS, min_size=1, max_size=4), text=WORDS)
def test_any_rule(folder: Path, parts: list[list[str]], text: list[str]) -> None:
    decide = built(folder, [*map(" ".join, parts)], Benchmark(str(folder), fields=("text",)))
    found = any(
        bool(runs(part, 4) & runs(text, 4)) if len(part) >= 4 else tuple(part) in runs(text, 3)
        for part in parts
        if len(part) >= 3
    )
    assert isinstance(decide(Document("d", " ".join(text))), Dropped) == found


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(WORDS, min_size=1, max_size=4), text=WORDS, tenths=st.integers(1, 10))
def test_ratio_rule(folder: Path, parts: list[list[str]], text: list[str], tenths: int) -> None:
    rule = Benchmark(str(folder), fields=("text",), rule="ratio", ratio=tenths / 10)
    decide = built(folder, [*map(" ".join, parts)], rule)
    found = any(
        10 * len(runs(part, 3) & runs(text, 3)) >= tenths * len(runs(part, 3))
        for part in parts
        if len(part) >= 3
    )
    assert isinstance(decide(Document("d", " ".join(text))), Dropped) == found


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(WORDS, min_size=1, max_size=4), text=WORDS)
def test_exact_rule(folder: Path, parts: list[list[str]], text: list[str]) -> None:
    decide = built(
        folder, [*map(" ".join, parts)], Benchmark(str(folder), fields=("text",), rule="exact")
    )
    found = any(tuple(p) in runs(text, len(p)) for p in parts if len(p) >= 3)
    assert isinstance(decide(Document("d", " ".join(text))), Dropped) == found


def test_the_detail_names_the_item_and_the_words(folder: Path) -> None:
    parts = ["aa bb cc dd", "aa aa bb bb cc cc"]
    decide = built(folder, parts, Benchmark(str(folder), name="toy"))
    decision = decide(Document("d", "x, y:\nAA - aa bb.\nBB cc!"))
    assert decision == Dropped("benchmark item", "toy items.jsonl#1: AA - aa bb. BB")


def test_numbers_and_letters_count_where_an_item_has_nothing_else(folder: Path) -> None:
    text = Document("d", "1, 2, 3, 4, a, b")
    with_words = built(folder, ["count 1 2 3 4 a b now"], Benchmark(str(folder)))
    assert with_words(text) == text
    assert isinstance(with_words(Document("d", "count 1 2 3")), Dropped)
    without = built(folder, ["1 2 3 4 a"], Benchmark(str(folder)))
    assert isinstance(without(text), Dropped)


def test_readings_of_hyphens_and_numbers(folder: Path) -> None:
    decide = built(folder, ["pay 1,000 to well-known people"], Benchmark(str(folder)))
    for text in (
        "pay 1000 to well known",
        "1000 to wellknown people",
        "1,000 to well-\nknown people",
    ):
        assert isinstance(decide(Document("d", text)), Dropped), text
    other = Document("d", "pay 100 to well-known friends")
    assert decide(other) == other
