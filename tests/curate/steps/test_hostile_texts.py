"""The heuristic filters bear any text: a verdict, and time that grows as the text does."""

from pathlib import Path

import pytest

from moebius.curate.document import Document, Dropped
from moebius.curate.step import Filter
from moebius.curate.steps.c4 import C4
from moebius.curate.steps.detect import Detect
from moebius.curate.steps.dirty_words import DirtyWords
from moebius.curate.steps.fineweb import FineWeb
from moebius.curate.steps.gopher_quality import GopherQuality
from moebius.curate.steps.gopher_repetition import GopherRepetition
from moebius.curate.steps.line_repetition import LineRepetition
from moebius.curate.steps.template import Template

# A text of this size that a pattern read twice at each character would take long.
SIZE = 20_000
PIECES = ["a", "a ", "字", "字。", ".", '.")', "{{", "{{a", "<%", "<", "$a", "a(", "((", "[1", "a'"]
PIECES += [
    "%(",
    "\\",
    "\n",
    "\r\x85\x0b",
    "\ud800 ",
    "\x00",
    "e\u0301",
    "a = ",
    "1 2",
    "a\n",
    "x: ",
]
PIECES += [
    "\U0001f595",
    "# ",
    "...",
    "- a\n\n",
    "a" * 40 + ":" + "b" * 70 + "\n",
    "(" * 390 + ";\n",
]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[Filter]:
    path: Path = tmp_path_factory.mktemp("lists") / "list.txt"
    path.write_text("a b\ns&m\n字 字\n\U0001f595\n", "utf-8")
    return [
        GopherQuality(min_words=1),
        GopherQuality(min_words=1, max_word_length=1e9, marks_are_words=True),
        GopherRepetition(),
        C4(),
        C4(endings=(), min_sentences=0),
        FineWeb(),
        LineRepetition(),
        DirtyWords(lists={"eng": str(path)}),
        Template(),
        Detect(),
    ]


@pytest.mark.parametrize("piece", PIECES)
def test_any_text_gets_a_verdict(steps: list[Filter], piece: str) -> None:
    text = piece * (SIZE // len(piece))
    for step in steps:
        decision = step.build()(Document("a", text))
        assert isinstance(decision, Dropped) or set(decision.text) <= set(text)


def test_code_is_not_held_to_rules_for_prose(steps: list[Filter]) -> None:
    code = Document("a", "x", kind="code")
    assert [type(step).__name__ for step in steps if step.takes(code)] == ["Detect"]
