"""What the tests of the heuristic filters share: real texts, poor ones, verdicts of datatrove."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from moebius.curate.document import Document, Dropped
from moebius.curate.step import Filter

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not here")
NO_PEER = "datatrove and spaCy are not installed: nothing to compare with"


def reason(step: Filter, text: str, language: str = "") -> str:
    """Why the step drops a text; nothing if it keeps it."""
    decision = step.build()(Document("a", text, language=language))
    return decision.reason if isinstance(decision, Dropped) else ""


def changed(step: Filter, text: str) -> str:
    """The text as the step keeps it."""
    decision = step.build()(Document("a", text))
    assert isinstance(decision, Document), decision
    return decision.text


def articles() -> list[str]:
    """Articles of the web as people cut them out."""
    path = DATA / "web/article-extraction-benchmark/ground-truth.json"
    return [page["articleBody"] for page in json.loads(path.read_text("utf-8")).values()]


def book_parts(language: str, size: int, each: int) -> list[str]:
    """Parts of books, the same ones each time."""
    rng = random.Random(5)
    parts: list[str] = []
    for path in sorted((DATA / "text" / language).glob("*.txt")):
        text = path.read_text("utf-8")
        starts = [rng.randrange(len(text) - size) for _ in range(each)]
        parts += [text[start : start + size] for start in starts]
    return parts


def answers() -> list[str]:
    """Worked answers of GSM8K."""
    lines = (DATA / "eval/gsm8k/test.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["answer"] for line in lines]


def poor_texts() -> list[str]:
    """Book texts spoilt in the ways that the rules look for, by all degrees."""
    rng = random.Random(7)
    words = " ".join(book_parts("en", 4000, 1)).split()

    def some(number: int) -> str:
        start = rng.randrange(len(words) - number)
        return " ".join(words[start : start + number])

    texts: list[str] = []
    for degree in range(8):
        repeated = [some(12)] * (degree + 1)
        phrase = some(4 + degree)
        texts += [
            "\n".join([*repeated, *(some(12) for _ in range(12))]),
            "\n\n".join([*([some(60)] * (degree // 2 + 1)), *(some(60) for _ in range(6))]),
            "\n".join(f"{some(60 - 6 * degree)} {phrase} {some(10)}" for _ in range(10)),
            " ".join(word + "#" * (rng.random() < degree / 40) for word in some(200).split()),
            "\n".join("- " * (rng.random() < 0.8 + degree / 40) + some(8) for _ in range(40)),
            "\n".join(some(12) + "..." * (rng.random() < degree / 14) for _ in range(40)),
            some(30 + 5 * degree),
            "\n".join(some(1 + degree) for _ in range(40)),
            "\n".join(some(12) + "." * (rng.random() < degree / 30) for _ in range(40)),
            "\n".join(f"{some(12)}{rng.choice(['.', '', ' JavaScript.', '?'])}" for _ in range(9)),
        ]
    return texts


def agreement(step: Filter, peer: Any, texts: list[str]) -> float:
    """The share of texts on which the step and a filter of datatrove decide alike."""
    datatrove = pytest.importorskip("datatrove.data", reason=NO_PEER)
    alike = 0
    for text in texts:
        verdict = peer.filter(datatrove.Document(text=text, id="a"))
        alike += bool(verdict is True or (verdict is not False and verdict[0])) == (
            not reason(step, text)
        )
    return alike / len(texts)


def peer_filter(module: str, name: str) -> Any:
    """A filter class of datatrove; skips the test where it or its tokenizer is not installed."""
    pytest.importorskip("spacy", reason=NO_PEER)
    return getattr(
        pytest.importorskip(f"datatrove.pipeline.filters.{module}", reason=NO_PEER), name
    )
