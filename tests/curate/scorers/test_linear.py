"""The linear scorer: its sums, its file, its errors."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from moebius.curate.scorers.features import features
from moebius.curate.scorers.linear import Linear, LinearModel, Shape

SHAPE = Shape(bits=10, grams=(2, 3), max_chars=100)


def model(temperature: float = 1.5) -> LinearModel:
    chance = np.random.default_rng(0)
    weights_VC = chance.normal(size=((1 << 10) + 1, 3)).astype(np.float32)
    return LinearModel(("bad", "fair", "good"), weights_VC, temperature, SHAPE, {"why": "a test"})


@pytest.mark.parametrize("text", ["", "one", "two words", "漢字", "x" * 100])
def test_scores_are_the_softmax_of_weighted_features(text: str) -> None:
    scorer = model()
    places, values = features(text, 10, (2, 3))
    logits = []
    for c in range(3):
        total = float(scorer.weights_VC[-1, c])
        for p, value in zip(places.tolist(), values.tolist(), strict=True):
            total += value * float(scorer.weights_VC[p, c])
        logits.append(total / 1.5)
    expected = [math.exp(x) / sum(map(math.exp, logits)) for x in logits]
    (found,) = scorer.score([text])
    assert list(found) == ["bad", "fair", "good"]
    assert list(found.values()) == pytest.approx(expected, rel=1e-4)


def test_a_saved_model_scores_the_same(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "quality.safetensors"
    model().save(path)
    loaded = Linear(str(path)).build()
    texts = ["one", "two words", ""]
    assert loaded.score(texts) == model().score(texts)
    assert loaded.facts == {"why": "a test"} and loaded.shape == SHAPE
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    model().save(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for data in (bytes(flipped), whole[:-1], whole[:50], whole[:3], b"", b"{}" * 40):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="not an intact linear scorer") as caught:
            LinearModel.load(path)
        assert "\n" not in str(caught.value)


def test_a_scorer_without_a_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs path"):
        Linear().build()
    with pytest.raises(ValueError, match="train one"):
        Linear(str(tmp_path / "absent")).build()


@pytest.mark.parametrize(
    "wrong", [{"bits": 3}, {"grams": (3, 2)}, {"grams": (9,)}, {"max_chars": 0}]
)
def test_shapes_are_checked(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(SHAPE, **wrong)
