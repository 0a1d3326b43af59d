"""A folder of imported weights becomes a run by `train --resume`, and is then one like any other.

Such a folder is made here from a run of `tiny`: its weights in bf16, and nothing else of its state.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import moebius
from moebius import checkpoint
from moebius.config import override
from moebius.data.loader import Loader
from moebius.data.prepare import prepare
from moebius.data.tokenizer import Tokenizer
from moebius.model.weight import named_weights
from moebius.train.folder import RunFolder
from moebius.train.passes import context_of
from moebius.train.session import read_run

from ..running import UNJUDGED, Place, lines, losses, tree, write_corpus

RECORD = {"name": "published", "precision": "bf16", "data": {"digest": None, "folder": None}}
COUNTERS = {"step": 0, "tokens": 0, "seconds": 0.0, "skipped": 0, "bad_in_a_row": 0}
STATE = {**COUNTERS, "weights_only": True, "data": None, "precision": "bf16"}
FIELDS = ("steps=6", "optim.lr=0.003", "checkpoint_every=100")


@pytest.fixture(scope="module")
def published(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported folder, its tokenizer trained on another text. Copied, never changed."""
    root = tmp_path_factory.mktemp("published")
    other = Place(root, write_corpus(root / "texts", 25), root / "cache")
    run = other.train("run", "stop_at=2")
    tensors, _ = checkpoint.load(checkpoint.complete(run / "checkpoints")[-1])
    folder = root / "imported"
    folder.mkdir()
    weights = {
        name: x.bfloat16() if x.is_floating_point() else x
        for name, x in tensors.items()
        if name.startswith("model.")
    }
    checkpoint.save(folder / "checkpoints", 0, weights, STATE, keep=1)
    shutil.copyfile(run / "tokenizer.json", folder / "tokenizer.json")
    recipe = json.loads((run / "run.json").read_text())["run"]
    recipe |= {"name": "published", "stop_at": None, "precision": "fp32"}
    recipe["data"] = {
        "path": str(place.corpus),
        "cache": str(place.cache),
        "tokenizer": "tokenizer.json",
        "document": "<|document|>",
    }
    record = {**RECORD, "run": recipe, "imported": {"family": "llama", "dropped": {}}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def imported(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(published: Path, place: Place) -> Path:
    run = shutil.copytree(published, place.folder / "whole")
    done = place.cli("train", "--resume", run, *FIELDS, UNJUDGED)
    assert done.code == 0, done.err
    assert "beginning with the imported weights" in done.out
    return run


def test_the_first_loss_is_that_of_the_weights(whole: Path, published: Path) -> None:
    run, record = read_run(RunFolder.open(whole))
    tokenizer = Tokenizer.load(published / "tokenizer.json")
    prepared = prepare(run.data, run.vocab)
    assert prepared.tokenizer.to_json() == tokenizer.to_json()
    assert (whole / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()
    texts = list(prepared.heldout_documents())
    assert sum(source.num_tokens for source in prepared.heldout) == sum(
        1 + len(tokenizer.encode(text.decode())) for _, text in texts
    )
    model, _ = moebius.load(published)
    assert {weight.dtype for _, weight in named_weights(model.lm)} == {torch.float32}
    batch = Loader(prepared, 32, 4, run.seed).batch(0)
    loss = model.lm.loss(batch.tokens_BT, batch.targets_BT, context_of(batch, 0))
    assert lines(whole)[0]["loss"] == float(loss.total) / batch.num_targets
    assert record["data"]["digest"] == prepared.digest


def test_the_run_is_written_with_what_was_set(whole: Path) -> None:
    record = json.loads((whole / "run.json").read_text())
    assert record["imported"] == {"family": "llama", "dropped": {}}
    assert (record["run"]["steps"], record["run"]["optim"]["lr"]) == (6, 0.003)
    assert record["run"]["data"]["tokenizer"] == "tokenizer.json"
    assert record["precision"] == "fp32" and len(record["fingerprint"]) == 64
    assert list(losses(whole)) == [1, 2, 3, 4, 5, 6]
    tensors, state = checkpoint.load(checkpoint.complete(whole / "checkpoints")[-1])
    assert state["step"] == 6 and "weights_only" not in state
    floats = {x.dtype for x in tensors.values() if x.is_floating_point()}
    assert floats == {torch.float32}
    (event,) = lines(whole, "events.jsonl")
    assert (event["step"], event["kind"]) == (0, "resumed")


def test_it_is_resumed_exactly_once_it_has_begun(whole: Path, imported: Path, place: Place) -> None:
    assert place.cli("train", "--resume", imported, *FIELDS, "stop_at=2").code == 0
    moved = imported.rename(imported.with_name("moved"))
    for field, said in (("optim.lr=0.1", "optim.lr: 0.003 -> 0.1"), ("steps=9", "steps: 6 -> 9")):
        assert said in place.cli("train", "--resume", moved, field).error
    done = place.cli("train", "--resume", moved, "stop_at=none", UNJUDGED)
    assert done.code == 0, done.err
    assert losses(moved) == losses(whole)


def test_killed_before_its_first_checkpoint_it_begins_anew(
    whole: Path, imported: Path, place: Place
) -> None:
    assert place.cli("train", "--resume", imported, *FIELDS, "stop_at=2").code == 0
    shutil.rmtree(checkpoint.complete(imported / "checkpoints")[-1])
    done = place.cli("train", "--resume", imported, "stop_at=none", UNJUDGED)
    assert done.code == 0, done.err
    assert losses(imported) == losses(whole)


@pytest.mark.parametrize(
    "fields",
    [
        ("seed=3",),
        ("batch=2", "sequence_length=64"),
        ("precision=auto", "name=mine"),
        ("data.seed=3", "optim.schedule=cosine"),
        ('stages=[{"at_tokens": 128, "sequence_length": 64, "rope_base": 1e6}]',),
        ("data.document=none",),
    ],
)
def test_what_may_be_set_before_the_first_step(
    fields: tuple[str, ...], imported: Path, place: Place
) -> None:
    done = place.cli("train", "--resume", imported, *FIELDS, *fields, "stop_at=2")
    assert done.code == 0, done.err
    kept, _ = read_run(RunFolder.open(imported))
    assert override(kept, [*fields]) == kept
    assert place.cli("train", "--resume", imported, "stop_at=3").code == 0
    assert list(losses(imported)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("vocab=400", "vocab: 300 -> 400"),
        ("model.layers.0.moe.top_k=2", "model.layers.0.moe.top_k: 3 -> 2"),
        ("data.tokenizer=/else/tokenizer.json", "-> '/else/tokenizer.json'"),
        ("data.path=/nowhere", "/nowhere"),
        ("optim.clip=-1", "clip=-1"),
    ],
)
def test_what_may_not(field: str, said: str, imported: Path, place: Place) -> None:
    before, record = tree(imported), (imported / "run.json").read_bytes()
    error = place.cli("train", "--resume", imported, *FIELDS, field).error
    assert said in error
    assert set(tree(imported)) - set(before) <= {".lock"}
    assert (imported / "run.json").read_bytes() == record


def test_a_tokenizer_of_more_tokens_than_the_model_has(imported: Path, place: Place) -> None:
    """As where somebody put another file in the folder."""
    text = (imported / "tokenizer.json").read_text()
    data = json.loads(text)
    odd = {"special": False, "single_word": False, "lstrip": False, "rstrip": False}
    data["added_tokens"].append({"id": 300, "content": "odd", "normalized": False, **odd})
    (imported / "tokenizer.json").write_text(json.dumps(data))
    cached = tree(place.cache)
    error = place.cli("train", "--resume", imported, *FIELDS).error
    assert "has 301 tokens and the model's vocab is 300; set vocab to at least 301" in error
    assert tree(place.cache) == cached


def test_weights_that_are_gone_or_do_not_fit(imported: Path, place: Place) -> None:
    path = checkpoint.complete(imported / "checkpoints")[0]
    tensors, state = checkpoint.load(path)
    shutil.rmtree(imported / "checkpoints")
    error = place.cli("train", "--resume", imported, *FIELDS).error
    assert "the imported weights of" in error and "are gone" in error
    tensors["model.embed.w_VD"] = tensors["model.embed.w_VD"][:299]
    tensors.pop("model.head.norm.w_D")
    checkpoint.save(imported / "checkpoints", 0, tensors, state, keep=1)
    error = place.cli("train", "--resume", imported, *FIELDS).error
    assert "does not fit this model: head.norm.w_D, embed.w_VD" in error
    assert not (imported / "metrics.jsonl").exists()
