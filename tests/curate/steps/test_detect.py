"""Code and reasoning: what is counted, which label wins, and accuracy on real texts."""

import json
import re
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from moebius.curate.document import Document, Dropped
from moebius.curate.steps.detect import Detect, code_share, reasoning_weight

from .peers import DATA, answers, articles, book_parts, needs_data

PYTHON = "def f(x):\n    y = g(x)\n    return y + 1\n"
ALGEBRA = r"Suppose $x^2 = 4$. Hence $x = \pm 2$, and therefore $\frac{x}{2} = \pm 1$."
TALE = "He went out into the rain and thought of nothing; it was late.\n"


def label(text: str) -> str:
    decision = Detect().build()(Document("a", text))
    assert isinstance(decision, Document)
    return decision.labels["content"]


@pytest.mark.parametrize(
    "line",
    [
        "import numpy as np",
        "from os import path",
        "class Thing(Base):",
        "for (int i = 0; i < n; i++) {",
        "} else {",
        "}",
        "x = compute(a, b)",
        "total += price",
        "self.items.append(3)",
        "#include <stdio.h>",
        "// what follows",
        "if (a == b && c != d)",
        "const x = () => 3;",
        "<div class='a'>",
        ">>> print(1)",
        "$ pip install this",
        "SELECT name FROM users",
        "'key': 'value',",
        "fn main() {",
        "std::vector<int> v;",
    ],
)
def test_lines_of_code(line: str) -> None:
    assert code_share(f"    {line}\n\n") == 1.0


@pytest.mark.parametrize(
    "line",
    [
        "It was late; he went home;",
        "What is more (so he said), it rained.",
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.",
        "import of goods fell in May, for the first time",
        "If you go there, take a coat: it is cold.",
        "Return to sender, said the letter.",
        "The class of 1950 met again.",
        "Choose the answer (one or two):",
        "===",
        "Total = 5",
        "这是一行没有代码的文字。",
    ],
)
def test_lines_of_prose(line: str) -> None:
    assert code_share(line) == 0.0


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("", 0.0),
        (" ".join(["word"] * 100), 0.0),
        (" ".join(["word"] * 99 + ["therefore"]), 0.5),
        (" ".join(["word"] * 98 + [r"\frac{1}", "$x^2$"]), 2.0),
        (" ".join(["word"] * 97 + ["3", "+", "4"]), 1.0),
        (" ".join(["word"] * 96 + ["$5", "and", "$6", "each"]), 0.0),
        (" ".join(["word"] * 98 + ["45-17,", "2018/19"]), 0.0),
    ],
)
def test_reasoning_weight(text: str, weight: float) -> None:
    assert reasoning_weight(text) == pytest.approx(weight)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "text"),
        (TALE * 3, "text"),
        (PYTHON, "code"),
        (ALGEBRA, "reasoning"),
        (PYTHON + ALGEBRA, "code"),
        (TALE * 2 + PYTHON, "code"),
        (TALE * 8 + PYTHON, "text"),
        (TALE * 20 + ALGEBRA, "text"),
    ],
)
def test_labels(text: str, expected: str) -> None:
    assert label(text) == expected


def test_scores_are_kept_and_nothing_is_dropped_unasked() -> None:
    document = Document("a", PYTHON, scores={"quality": 0.5}, labels={"topic": "x"})
    decision = Detect().build()(document)
    assert isinstance(decision, Document)
    assert decision.text == PYTHON and decision.lineage == ()
    assert decision.scores == {
        "quality": 0.5,
        "code": code_share(PYTHON),
        "reasoning": reasoning_weight(PYTHON),
    }
    assert decision.labels == {"topic": "x", "content": "code"}


def test_keep_names_what_passes() -> None:
    decide = Detect(keep=("code", "reasoning")).build()
    assert decide(Document("a", TALE)) == Dropped("content of another class", "text")
    assert isinstance(decide(Document("a", PYTHON)), Document)
    with pytest.raises(ValueError, match="there is no 'maths'"):
        Detect(keep=("maths",))


def python_sources(number: int) -> list[str]:
    """Modules of the standard library, of the size of a page at least."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(folder.glob("*.py")) if path.stat().st_size > 800]
    return [path.read_text("utf-8", "replace") for path in paths[:number]]


def test_accuracy_on_python() -> None:
    labels = [label(text[:10_000]) for text in python_sources(60)]
    assert labels.count("code") >= 0.95 * len(labels)


@needs_data
def test_accuracy_on_prose_and_reasoning() -> None:
    prose = [*book_parts("en", 3000, 2), *book_parts("es", 3000, 2), *book_parts("zh", 800, 5)]
    assert Counter(map(label, [*prose, *articles()])).keys() == {"text"}
    worked = answers()[::3]
    labels = Counter(map(label, worked))
    assert labels["reasoning"] >= 0.98 * len(worked), labels
    # Without the marks that only this benchmark has.
    labels = Counter(label(re.sub("<<.*?>>", "", text)) for text in worked)
    assert labels["reasoning"] >= 0.97 * len(worked), labels
    lines = (DATA / "chat/t0_instructions.jsonl").read_text("utf-8").splitlines()[:300]
    labels = Counter(label(json.loads(line)["prompt"]) for line in lines)
    assert labels["text"] >= 0.99 * len(lines), labels
