"""Distilling: what the judge said is kept, and the student says the same of new documents."""

import json
import random
from pathlib import Path

import pytest

from moebius.curate.document import Document
from moebius.curate.scorers.distil import Distilled, distil
from moebius.curate.scorers.judge import Judge
from moebius.curate.scorers.linear import Linear, Shape

from .rules import Constant, Letters
from .server import Chat, serving

SMALL = Shape(bits=14, grams=(1, 2))


def documents(num: int, seed: int = 0) -> list[Document]:
    """Texts with more of the letter a, or more of b; every tenth with a question mark."""
    chance = random.Random(seed)
    found = []
    for i in range(num):
        letters = chance.choices("abcd ", weights=[(6, 1), (1, 6)][i % 2] + (2, 2, 2), k=80)
        found.append(Document(f"{seed}-{i}", "".join(letters) + "?" * (i % 10 == 9), "toys"))
    return found


def check(found: Distilled, folder: Path) -> None:
    """Held against the files that lie there."""
    report = json.loads((folder / "distilled.json").read_text(encoding="utf-8"))
    assert report["agreement"] == found.agreement and report["labels"] == found.labels
    assert sorted(path.name for path in folder.iterdir()) == [
        "distilled.json",
        "examples.jsonl",
        "student.safetensors",
    ]


def test_the_student_answers_as_its_judge(tmp_path: Path) -> None:
    taught = documents(400)
    found = distil(Letters("ab"), taught, tmp_path, shape=SMALL, batch=7)
    check(found, tmp_path)
    assert (found.num_labelled, found.num_unscored) == (360, 40)
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == [d.key for d in taught if "?" not in d.text]
    assert all(row["label"] == max("ab", key=row["text"].count) for row in rows)
    assert found.agreement >= 0.95 and found.kappa >= 0.9
    student = Linear(str(tmp_path / "student.safetensors")).build()
    fresh = [d.text for d in documents(100, seed=1)]
    answers = [max(scores, key=lambda c: scores[c]) for scores in student.score(fresh)]
    same = sum(a == max("ab", key=t.count) for a, t in zip(answers, fresh, strict=True))
    assert same >= 95


def test_a_number_is_cut_where_the_user_says(tmp_path: Path) -> None:
    found = distil(Letters("a"), documents(200), tmp_path, at_least=0.3, shape=SMALL)
    texts = [d.text for d in documents(200) if "?" not in d.text]
    good = sum(t.count("a") / len(t) >= 0.3 for t in texts)
    assert found.labels == {"bad": len(texts) - good, "good": good}


def test_kappa_is_agreement_beyond_chance(tmp_path: Path) -> None:
    found = distil(Letters("ab"), documents(400), tmp_path, shape=Shape(bits=8, grams=()))
    judged = found.heldout
    total = judged.num_examples
    chance = sum(judged.labels[c] / total * judged.answers[c] / total for c in "ab")
    assert found.kappa == pytest.approx((judged.accuracy - chance) / (1 - chance))


def test_a_judge_over_http_teaches_and_is_not_asked_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{text}", encoding="utf-8")
    rule = Chat(lambda text: "?" if "?" in text else max("ab", key=text.count))
    with serving(rule) as chat:
        judge = Judge("m", str(prompt), ("a", "b"), base_url=chat.url, cache=str(tmp_path / "c"))
        found = distil(judge, documents(120), tmp_path / "one", shape=SMALL)
        assert len(chat.asked) == 120 and found.num_unscored == 12
        again = distil(judge, documents(120), tmp_path / "two", shape=SMALL)
        assert len(chat.asked) == 120 and again == found
    for name in ("examples.jsonl", "student.safetensors", "distilled.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_judge_that_cannot_teach_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at_least"):
        distil(Letters("a"), documents(30), tmp_path)
    with pytest.raises(ValueError, match="of one number"):
        distil(Letters("ab"), documents(30), tmp_path, at_least=1.0)
    with pytest.raises(ValueError, match="scored none of 3"):
        distil(Letters(), [Document(str(i), "?") for i in range(3)], tmp_path)
    with pytest.raises(ValueError, match="scored none of 3"):
        distil(Constant(float("nan")), documents(3), tmp_path, at_least=1.0)
    with pytest.raises(ValueError, match="two classes"):
        distil(Constant(1.0), documents(50), tmp_path, at_least=1.0)
