"""A run's loss as a score, against logits taken one window at a time and against evaluation."""

import math
from pathlib import Path

import pytest
import torch

from moebius.config import from_json
from moebius.curate.document import Document, Dropped
from moebius.curate.steps.quality import Quality
from moebius.data.prepare import prepare
from moebius.data.prepared import Prepared
from moebius.eval.bits_per_byte import Heldout, bits_per_byte
from moebius.infer.load import load
from moebius.lab.loss_scorer import LossScorer
from moebius.monitor.runs import read_json
from moebius.train.run import Run

TEXTS = ["def return while", "", "élan 漢字\n    = 17", "the of # " * 60, "\ud800 x"]


@pytest.fixture(scope="module")
def prepared(reference: Path) -> Prepared:
    run = from_json(Run, read_json(reference / "run.json")["run"])
    return prepare(run.data, run.vocab)


def by_hand(run: Path, text: str, window: int) -> float:
    """Bits per byte from the logits of each window, one token after the other."""
    model, tokenizer = load(run)
    data = text.encode("utf-8", "replace")
    tokens = [tokenizer.document, *tokenizer.encode(data.decode()), tokenizer.document]
    bits = 0.0
    for start in range(0, len(tokens) - 1, window):
        part = tokens[start : start + window + 1]
        logp_TV = model(torch.tensor([part[:-1]]))[0].double().log_softmax(-1)
        bits -= sum(float(logp_TV[i, token]) for i, token in enumerate(part[1:])) / math.log(2)
    return bits / len(data)


@pytest.mark.parametrize("window", [None, 7, 1000])
def test_scores_are_bits_per_byte(reference: Path, one_thread: None, window: int | None) -> None:
    found = LossScorer(str(reference), window=window).build().score(TEXTS)
    for text, scores in zip(TEXTS, found, strict=True):
        if text:
            expected = by_hand(reference, text, window or 32)
            assert scores == {"score": pytest.approx(expected, rel=1e-4)}
        else:
            assert scores == {}


def test_documents_add_up_to_what_evaluation_says(
    reference: Path, prepared: Prepared, one_thread: None
) -> None:
    """In one window that holds all held-out documents, which see nothing of each other."""
    model, _ = load(reference)
    texts = [text.decode() for _, text in prepared.heldout_documents()]
    size = sum(source.num_tokens for source in prepared.heldout)
    heldout = Heldout(prepared, size, 1, torch.float32, torch.device("cpu"))
    judged = bits_per_byte(model.lm, heldout)
    scores = LossScorer(str(reference), window=size).build().score(texts)
    total = sum(s["score"] * len(t.encode()) for s, t in zip(scores, texts, strict=True))
    assert len(texts) > 1
    assert total / judged.num_bytes == pytest.approx(judged.bits_per_byte, rel=1e-5)


def test_a_long_text_is_judged_by_its_beginning(reference: Path, one_thread: None) -> None:
    """And its end, which is not there, is not expected."""
    scorer = LossScorer(str(reference), max_chars=30, window=1000).build()
    cut = ("the of while return " * 9)[:30]
    (found,) = scorer.score(["the of while return " * 500_000])
    tokens = torch.tensor([scorer.tokenizer.document, *scorer.tokenizer.encode(cut)])
    assert found["score"] == scorer.nats(tokens) / math.log(2) / 30
    (whole,) = scorer.score([cut])
    assert whole["score"] > found["score"]


def test_a_text_scores_the_same_in_any_company(reference: Path, one_thread: None) -> None:
    scorer = LossScorer(str(reference)).build()
    together = scorer.score(TEXTS)
    assert together == [scorer.score([text])[0] for text in TEXTS]


def test_quality_keeps_what_the_model_finds_likely(reference: Path, one_thread: None) -> None:
    scorer = LossScorer(str(reference))
    likely, odd = "tokens of the expert while def return\n", "Zqx!! JJJ@@ %%%% ~~~ ^^&& ||| QWZ"
    scores = [s["score"] for s in scorer.build().score([likely, odd])]
    assert scores[0] < scores[1]
    decide = Quality(scorer=scorer, maximum=sum(scores) / 2, name="loss").build()
    kept = decide(Document("k", likely))
    assert isinstance(kept, Document) and kept.scores == {"loss": scores[0]}
    assert isinstance(decide(Document("k", odd)), Dropped)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs run"):
        LossScorer().build()
    with pytest.raises(ValueError, match="there is no run in"):
        LossScorer(str(tmp_path)).build()
    with pytest.raises(ValueError, match="at least 1"):
        LossScorer("x", window=0)
