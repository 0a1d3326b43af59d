"""The steps that decide by a scorer: quality and topic."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moebius.config import from_json, override, to_json
from moebius.curate.document import Document, Dropped
from moebius.curate.scorers.hf import Classifier
from moebius.curate.scorers.judge import Judge
from moebius.curate.scorers.linear import Linear, LinearModel
from moebius.curate.scorers.train import Shape, train_linear
from moebius.curate.step import Filter, Step
from moebius.curate.steps.quality import Quality
from moebius.curate.steps.topic import Topic
from moebius.curate.text import hash_of
from moebius.lab.loss_scorer import LossScorer

from ..scorers import rules
from ..scorers.rules import Constant, Letters


def documents(num: int, text: str = "aabb", source: str = "s") -> list[Document]:
    return [Document(f"page/{i}.html", text, source) for i in range(num)]


@pytest.mark.parametrize(
    ("minimum", "maximum", "kept"),
    [
        (None, None, "aab b"),
        (0.5, None, "aab"),
        (None, 0.5, "b"),
        (0.4, 0.6, ""),
        (2 / 3, 2 / 3, "aab"),
    ],
)
def test_what_lies_within_the_bounds_is_kept(
    minimum: float | None, maximum: float | None, kept: str
) -> None:
    decide = Quality(scorer=Letters("ab"), score="a", minimum=minimum, maximum=maximum).build()
    for text, value in (("aab", 2 / 3), ("b", 0.0)):
        decision = decide(Document("k", text))
        if text in kept.split():
            assert isinstance(decision, Document)
            assert decision.scores == {"quality": value} and decision.text == text
        else:
            assert isinstance(decision, Dropped) and decision.reason == "low quality score"
            assert decision.detail.startswith("quality 0")


def test_scores_of_other_steps_stay() -> None:
    given = Document("k", "ab").with_score("fluency", 0.25)
    decision = Quality(scorer=Letters("a"), name="letters").build()(given)
    assert isinstance(decision, Document)
    assert decision.scores == {"fluency": 0.25, "letters": 0.5}


@pytest.mark.parametrize("scorer", [Letters(), Constant(float("nan")), Constant(float("inf"))])
@pytest.mark.parametrize("kind", [Quality, Topic])
def test_what_has_no_score_is_dropped_even_from_the_random_share(
    scorer: Any, kind: type[Filter]
) -> None:
    step = kind(scorer=scorer)  # pyright: ignore[reportCallIssue]
    if isinstance(step, Quality):
        step = dataclasses.replace(step, score="a", keep_random=1.0)
    decision = step.build()(Document("k", "what?"))
    assert isinstance(decision, Dropped) and decision.reason == "could not be scored"


def test_a_random_share_of_the_refused_is_kept_by_source_and_key() -> None:
    step = Quality(scorer=Constant(0.0), minimum=1.0, keep_random=0.3)
    decide = step.build()
    given = documents(2000)
    kept = {d.key for d in given if isinstance(decide(d), Document)}
    expected = {d.key for d in given if hash_of(f"s\n{d.key}") / 2**64 < 0.3}
    assert kept == expected and 520 < len(kept) < 680
    # More of a share keeps what a smaller one kept; another source or seed draws anew.
    wider = dataclasses.replace(step, keep_random=0.5).build()
    assert kept < {d.key for d in given if isinstance(wider(d), Document)}
    for again, texts in (
        (decide, documents(2000, source="t")),
        (dataclasses.replace(step, seed=1).build(), given),
    ):
        other = {d.key for d in texts if isinstance(again(d), Document)}
        assert len(kept & other) < 300


def test_topics_are_labelled_and_thinned_out() -> None:
    step = Topic(scorer=Letters("abc"), share={"a": 0.25, "c": 0.0})
    decide = step.build()
    counts: Counter[str] = Counter()
    for text in ("aab", "abb", "cab c"):
        for document in documents(1000, text):
            decision = decide(document)
            if isinstance(decision, Dropped):
                assert decision.reason == "over-represented topic"
                counts[decision.detail] += 1
            else:
                assert decision.labels == {"topic": max("abc", key=text.count)}
                counts[decision.labels["topic"]] += 1
    assert counts["b"] == 1000 and counts["topic c"] == 1000
    assert 200 < counts["a"] < 300 and counts["a"] + counts["topic a"] == 1000


def test_of_equal_topics_the_first_by_name_counts() -> None:
    decision = Topic(scorer=Letters("cab")).build()(Document("k", "bca"))
    assert isinstance(decision, Document) and decision.labels == {"topic": "a"}


def test_a_class_the_scorer_lacks_is_an_error_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no score 'score'.*valid: a, b"):
        Quality(scorer=Letters("ab")).build()(Document("k", "ab"))
    with pytest.raises(ValueError, match=r"a class the scorer lacks.*valid: a, b"):
        Topic(scorer=Letters("ab"), share={"arts": 0.5}).build()(Document("k", "ab"))


@pytest.mark.parametrize(
    "step",
    [
        Quality(scorer=Linear("m.safetensors"), score="good", minimum=0.5, keep_random=0.05),
        Quality(scorer=Classifier("folder", classes=("a", "b")), maximum=1.0, kinds=("web",)),
        Quality(scorer=Judge("m", "p.txt", extra={"top_p": 1, "stop": ["\n"]}), minimum=3.0),
        Quality(scorer=LossScorer("runs/x", window=128), maximum=2.0, sources=("books",)),
        Topic(scorer=Linear("t.safetensors"), share={"arts": 0.2, "sport": 0.5}),
    ],
)
def test_steps_go_through_json_with_the_scorer_inside(step: Filter) -> None:
    data = json.loads(json.dumps(to_json(step)))
    assert from_json(Step, data) == step
    assert ":" not in data["use"] + data["scorer"]["use"]


def test_a_scorer_of_the_users_own_is_named_by_its_file() -> None:
    data = {"use": "quality", "scorer": {"use": f"{rules.FILE}:Letters", "letters": "a"}}
    step = from_json(Step, data)
    decision = step.build()(Document("k", "ab"))
    assert decision.scores == {"quality": 0.5}
    assert to_json(step)["scorer"] == data["scorer"]


def test_fields_of_the_scorer_are_overridden_by_path() -> None:
    step = override(Quality(scorer=Linear("a")), ["scorer.path=b", "minimum=0.25"])
    assert step == Quality(scorer=Linear("b"), minimum=0.25)
    judge = override(step, ["scorer=judge", "scorer.model=m"])
    assert judge.scorer == Judge(model="m")
    assert override(Topic(share={"arts": 1.0}), ["share.arts=0.5"]).share == {"arts": 0.5}


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Quality, {"keep_random": 1.5}),
        (Quality, {"minimum": 2.0, "maximum": 1.0}),
        (Topic, {"share": {"arts": -0.1}}),
    ],
)
def test_configs_are_checked(kind: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        kind(**wrong)
    with pytest.raises(ValueError, match="needs path"):
        kind().build()


def test_a_trained_scorer_cleans_a_corpus(tmp_path: Path) -> None:
    """From labelled examples to decisions, as a recipe does it."""
    good, bad = "the cat sat on the mat near a door", "buy cheap pills now click here free"
    examples = [
        (f"{text} {i}", label) for i in range(60) for text, label in ((good, "good"), (bad, "bad"))
    ]
    model, _ = train_linear(examples, Shape(bits=12, grams=(3,)))
    model.save(tmp_path / "m.safetensors")
    assert isinstance(Linear(str(tmp_path / "m.safetensors")).build(), LinearModel)
    decide = Quality(
        scorer=Linear(str(tmp_path / "m.safetensors")), score="good", minimum=0.5
    ).build()
    assert isinstance(decide(Document("1", "a cat sat near the door")), Document)
    assert isinstance(decide(Document("2", "click here for free pills")), Dropped)
