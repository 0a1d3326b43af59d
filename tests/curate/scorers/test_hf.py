"""The Hugging Face classifier: a tiny model with random weights, saved here, against its logits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.curate.scorers.hf import Classifier

transformers = pytest.importorskip("transformers", reason="needs the hf extra")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "tea", "is", "good", "bad")
TEXTS = ["the tea is good", "bad", "", "a tea the tea is bad bad bad", "zebra", "good " * 40]


def write(folder: Path, **config: Any) -> Path:
    """Save a BERT of one layer and a tokenizer of whole words."""
    torch.manual_seed(0)
    shape = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
    made = transformers.BertConfig(**shape, **heads, initializer_range=1.0, **config)
    transformers.BertForSequenceClassification(made).save_pretrained(folder)
    index = {word: i for i, word in enumerate(WORDS)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(index, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    inner.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    return folder


def logits(folder: Path, text: str, limit: int) -> list[float]:
    """One text at a time: words to numbers by hand, no padding."""
    ids = [WORDS.index(word) if word in WORDS else 1 for word in text.split()][: limit - 2]
    model = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([[2, *ids, 3]])).logits[0].tolist()


def test_classes_are_a_softmax_whatever_is_batched(tmp_path: Path) -> None:
    names = {0: "poor", 1: "fair", 2: "good"}
    folder = write(tmp_path / "three", num_labels=3, id2label=names)
    for batch in (1, 4):
        found = Classifier(str(folder), max_tokens=12, batch=batch).build().score(TEXTS)
        for text, scores in zip(TEXTS, found, strict=True):
            expected = torch.tensor(logits(folder, text, 12)).softmax(0).tolist()
            assert list(scores) == ["poor", "fair", "good"]
            assert list(scores.values()) == pytest.approx(expected, abs=1e-5)


def test_one_output_is_a_number_named_score(tmp_path: Path) -> None:
    folder = write(tmp_path / "one", num_labels=1)
    found = Classifier(str(folder), max_tokens=12).build().score(TEXTS)
    for text, scores in zip(TEXTS, found, strict=True):
        assert scores == {"score": pytest.approx(logits(folder, text, 12)[0], abs=1e-4)}


def test_labels_that_hold_together_are_sigmoids_and_may_be_named(tmp_path: Path) -> None:
    kind = "multi_label_classification"
    folder = write(tmp_path / "two", num_labels=2, problem_type=kind)
    scorer = Classifier(str(folder), max_tokens=12, classes=("mathematics", "code")).build()
    (found,) = scorer.score(TEXTS[:1])
    expected = torch.tensor(logits(folder, TEXTS[0], 12)).sigmoid().tolist()
    assert list(found) == ["mathematics", "code"]
    assert list(found.values()) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="has 2 outputs; classes names 1"):
        Classifier(str(folder), classes=("code",)).build()


def test_long_and_broken_texts_are_scored(tmp_path: Path) -> None:
    scorer = Classifier(str(write(tmp_path / "one", num_labels=1)), max_tokens=32).build()
    found = scorer.score(["tea " * (4 << 20), "\ud800 tea \x00", "tea " * 30, "? tea \x00"])
    scores = [each["score"] for each in found]
    assert scores[:2] == [pytest.approx(score, abs=1e-5) for score in scores[2:]]


def test_a_folder_without_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no classifier in 'path'"):
        Classifier().build()
    with pytest.raises(ValueError, match="there is no classifier in"):
        Classifier(str(tmp_path)).build()
    folder = write(tmp_path / "broken", num_labels=1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is not a classifier that can be read") as caught:
        Classifier(str(folder)).build()
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="at least 1"):
        Classifier(max_tokens=0)
