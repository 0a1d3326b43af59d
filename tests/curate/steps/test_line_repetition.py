"""Lines that repeat themselves against the plainest count of the same."""

import random

import pytest

from moebius.curate.document import Document, Dropped
from moebius.curate.steps.gopher_repetition import DUPLICATE_NGRAMS
from moebius.curate.steps.line_repetition import LineRepetition
from moebius.curate.text import words

from .peers import articles, book_parts, changed, needs_data, reason

LOG = "GET /a/b/c from host port 80 ok; " * 4
PLAIN = "A line of plain words, none of which comes back in it at all.\n"


def is_repetitive(line: str, rules: tuple[tuple[int, float], ...]) -> bool:
    """Of one line and with nothing but sets: characters in n-grams that stood in it before."""
    found = words(line)
    for n, most in rules:
        seen: set[tuple[str, ...]] = set()
        inside: set[int] = set()
        for start in range(len(found) - n + 1):
            ngram = tuple(found[start : start + n])
            if ngram in seen:
                inside.update(range(start, start + n))
            seen.add(ngram)
        if sum(len(found[i]) for i in inside) > most * len(line):
            return True
    return False


@pytest.mark.parametrize("rules", [DUPLICATE_NGRAMS, ((2, 0.3),), ((3, 0.0), (6, 0.5))])
def test_lines_equal_the_plain_count(rules: tuple[tuple[int, float], ...]) -> None:
    rng = random.Random(11)
    vocabulary = ["a", "bee", "sea's", "dée", "e", "фф", "gee", "1", "aitch", "I", "jay", "kay"]
    removed = kept = 0
    for _ in range(40):
        lines = [
            " ".join(rng.choices(vocabulary[: rng.randrange(1, 13)], k=rng.randrange(60)))
            for _ in range(rng.randrange(1, 12))
        ]
        expected = [line for line in lines if not is_repetitive(line, rules)]
        step = LineRepetition(duplicate_ngrams=rules, min_left=0.0)
        assert changed(step, "\n".join(lines)) == "\n".join(expected)
        removed, kept = removed + len(lines) - len(expected), kept + len(expected)
    assert min(removed, kept) > 30


def test_only_the_repetitive_line_goes() -> None:
    text = f"{PLAIN}{LOG}\n\n{PLAIN}"
    decision = LineRepetition().build()(Document("a", text))
    assert decision == Document("a", f"{PLAIN}\n{PLAIN}", lineage=("line_repetition",))
    # The same line twice is no repetition within a line.
    assert changed(LineRepetition(), PLAIN * 9) == PLAIN * 9


def test_a_document_of_such_lines_is_dropped() -> None:
    assert LineRepetition().build()(Document("a", f"{LOG}\n{LOG}\nok")) == Dropped(
        "mostly repetitive lines", "2 of 3 lines"
    )
    assert changed(LineRepetition(min_left=0.0), f"{LOG}\nok") == "ok"
    assert changed(LineRepetition(), "") == ""


def test_characters_stand_for_words_where_there_are_no_spaces() -> None:
    rng = random.Random(2)
    line = "".join(chr(0x4E00 + rng.randrange(9000)) for _ in range(60))
    five, ten = line[:5] + line[40:50] + line[:5], line[:12] + line[40:50] + line[:12]
    assert changed(LineRepetition(), f"{PLAIN}{five}\n{ten}") == f"{PLAIN}{five}"
    thai = "".join(chr(0x0E01 + rng.randrange(40)) for _ in range(120))
    some, much = thai[:15] + thai[60:70] + thai[:15], thai[:30] + thai[60:80] + thai[:30]
    assert changed(LineRepetition(), f"{PLAIN}{some}\n{much}\n{five}") == f"{PLAIN}{some}\n{five}"


def test_a_user_is_told_what_n_may_be() -> None:
    with pytest.raises(ValueError, match="n >= 2"):
        LineRepetition(duplicate_ngrams=())


@needs_data
def test_books_and_articles_stay() -> None:
    texts = [*book_parts("en", 6000, 1), *book_parts("es", 6000, 1), *book_parts("zh", 3000, 3)]
    texts += articles()
    assert not any(reason(LineRepetition(), text) for text in texts)
    shorter = sum(len(text) - len(changed(LineRepetition(), text)) for text in texts)
    assert shorter < 0.001 * sum(map(len, texts))
