"""Training linear scorers: real tasks, held-out figures by hand, the same result each time."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from moebius.curate.scorers.linear import LinearModel, Shape
from moebius.curate.scorers.train import (
    Options,
    digest_of,
    evaluate,
    read_examples,
    split,
    train_linear,
)

from .real import articles, books, code, prose, salad

SMALL = Shape(bits=14, grams=(3,))


def toy(num: int, wrong: float = 0.0, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of two vocabularies; a share `wrong` has the other's label."""
    chance = random.Random(seed)
    found = []
    for i in range(num):
        stems = ("alpha beta gamma delta", "kappa lambda sigma omega")[i % 2].split()
        text = " ".join(chance.choices([*stems, "the", "of", "and"], k=12)) + f" {i}"
        label = ("low", "high")[(i % 2) ^ (chance.random() < wrong)]
        found.append((text, label))
    return found


def test_prose_is_told_from_word_salad_in_books_not_seen() -> None:
    seen, unseen = salad(prose(books()[:14], 20)), salad(prose(books()[14:], 20))
    model, heldout = train_linear(seen)
    assert heldout.accuracy >= 0.95
    judged = evaluate(model, unseen)
    assert judged.accuracy >= 0.97 and judged.majority < 0.52
    assert judged.calibration_error < 0.1


def test_python_is_told_from_prose_in_files_not_seen() -> None:
    model, _ = train_linear(prose(books()[:10], 15) + code(slice(0, 60), 4))
    judged = evaluate(model, prose(books()[10:], 15) + code(slice(60, None), 4))
    assert judged.accuracy >= 0.98


def test_articles_are_told_from_boilerplate_of_pages_not_seen() -> None:
    """One site's article may hold what another's sidebar does: this one is hard."""
    model, _ = train_linear(articles(slice(0, 70)))
    judged = evaluate(model, articles(slice(70, 110)))
    assert judged.accuracy >= judged.majority + 0.1
    assert judged.calibration_error < 0.15


def test_the_same_examples_in_any_order_give_the_same_file(tmp_path: Path) -> None:
    examples = toy(200)
    files = []
    for name, order in (("a", examples), ("b", examples[::-1])):
        model, _ = train_linear(order, SMALL)
        model.save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
    other, _ = train_linear(examples, SMALL, Options(seed=1))
    assert not np.array_equal(other.weights_VC, LinearModel.load(tmp_path / "a").weights_VC)


def test_probabilities_mean_what_they_say_where_labels_are_noisy() -> None:
    """A fifth of the labels is wrong: no one can be right more often, nor should be surer."""
    model, _ = train_linear(toy(2000, wrong=0.2), SMALL)
    fresh = toy(1000, wrong=0.2, seed=1)
    judged = evaluate(model, fresh)
    assert judged.accuracy == pytest.approx(0.8, abs=0.04)
    assert judged.calibration_error < 0.08
    surest = [max(scores.values()) for scores in model.score([text for text, _ in fresh])]
    assert np.mean(surest) == pytest.approx(0.8, abs=0.08)


def test_figures_are_those_counted_by_hand() -> None:
    model, _ = train_linear(toy(200, wrong=0.3), SMALL)
    examples = toy(90, wrong=0.4, seed=3)
    judged = evaluate(model, examples)
    scores = [model.score([text])[0] for text, _ in examples]
    answers = [max(given, key=lambda label: given[label]) for given in scores]
    labels = [label for _, label in examples]
    right = [a == b for a, b in zip(answers, labels, strict=True)]
    assert judged.num_examples == 90 and judged.accuracy == pytest.approx(sum(right) / 90)
    assert judged.majority == max(labels.count("low"), labels.count("high")) / 90
    for name in ("low", "high"):
        hits = sum(ok for ok, label in zip(right, labels, strict=True) if label == name)
        assert judged.recall[name] == pytest.approx(hits / labels.count(name))
        assert judged.labels[name] == labels.count(name)
        assert judged.answers[name] == answers.count(name)
    assert sum(judged.confused.values()) == 90 - sum(right)
    given = [float(np.log(s[label])) for s, label in zip(scores, labels, strict=True)]
    assert judged.log_loss == pytest.approx(-sum(given) / 90)
    gap = 0.0
    for tenth in range(10):
        inside = [
            (max(s.values()), ok)
            for s, ok in zip(scores, right, strict=True)
            if tenth / 10 <= max(s.values()) < (tenth + 1) / 10
        ]
        gap += abs(sum(sure for sure, _ in inside) - sum(ok for _, ok in inside))
    assert judged.calibration_error == pytest.approx(gap / 90)


def test_a_split_keeps_copies_together_and_classes_in_proportion() -> None:
    examples = toy(300)
    doubtful = [("said both", "low"), ("said both", "high"), ("said both", "low")]
    parts = split([*examples, *examples[:40], *doubtful])
    assert parts.num_repeated == 40 and parts.num_contradictory == 1
    sides = [set(parts.train), set(parts.calibrate), set(parts.heldout)]
    assert set.union(*sides) == set(examples) and sum(map(len, sides)) == 300
    for side, count in zip(sides, (120, 15, 15), strict=True):
        assert [sum(label == name for _, label in side) for name in ("low", "high")] == [count] * 2


def test_a_model_knows_what_it_was_trained_on() -> None:
    examples = toy(100)
    model, judged = train_linear(examples, SMALL)
    train = split(examples).train
    assert model.facts["training_sha256"] == digest_of(train[::-1]) != digest_of(train[1:])
    assert model.facts["num_examples"] == {"high": 40, "low": 40}
    assert model.facts["heldout"]["accuracy"] == judged.accuracy
    assert json.loads(json.dumps(model.facts)) == model.facts


def test_examples_are_read_from_lines(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n{"text": "b"}\n', encoding="utf-8")
    rows = read_examples(path)
    assert next(rows) == ("a", "x")
    with pytest.raises(ValueError, match=r"examples\.jsonl:2 is not an object"):
        next(rows)
    with pytest.raises(ValueError, match="cannot read the examples"):
        next(read_examples(tmp_path / "absent"))


def test_too_little_to_learn_from_is_refused() -> None:
    with pytest.raises(ValueError, match="two classes"):
        train_linear([("a", "x")] * 30)
    with pytest.raises(ValueError, match="has 5 distinct texts"):
        train_linear([*toy(100), *((f"rare {i}", "rare") for i in range(5))])
    with pytest.raises(ValueError, match="knows no class 'rare'"):
        evaluate(train_linear(toy(40), SMALL)[0], [("a", "rare")])
    with pytest.raises(ValueError, match="epochs"):
        Options(epochs=0)
