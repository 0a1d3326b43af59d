"""A corpus read with a tokenizer that is given, not trained: its bytes are part of what it is."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from moebius.data.config import DataConfig
from moebius.data.prepare import prepare
from moebius.data.prepared import Prepared
from moebius.data.tokenizer import Tokenizer, train_tokenizer

from .conftest import text_of, write_folder


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    tokenizer = train_tokenizer((text_of(i) for i in range(500, 510)), 280)
    tokenizer.save(tmp_path / "mine.json")
    texts = write_folder(tmp_path / "texts", 30)
    own = str(tmp_path / "mine.json")
    return DataConfig(path=str(texts), cache=str(tmp_path / "cache"), tokenizer=own)


def texts_of(prepared: Prepared) -> dict[str, bytes]:
    return dict([*prepared.train_documents(), *prepared.heldout_documents()])


def test_its_tokens_are_used_as_they_are(config: DataConfig, tmp_path: Path) -> None:
    prepared = prepare(config, 1000)
    given = Tokenizer.load(tmp_path / "mine.json")
    assert prepared.tokenizer.to_json() == given.to_json()
    copy = prepared.folder / "tokenizer.json"
    assert copy.read_bytes() == (tmp_path / "mine.json").read_bytes()
    expected = {text: 1 + len(given.encode(text.decode())) for text in texts_of(prepared).values()}
    assert sum(expected.values()) == sum(
        source.num_tokens for side in ("train", "heldout") for source in prepared.side(side)
    )
    assert prepared.manifest["tokenizer"] == {"vocab": 280, "asked": 1000, "trained_bytes": 0}
    plain = prepare(dataclasses.replace(config, tokenizer=None), 280)
    assert plain.digest != prepared.digest and texts_of(plain) == texts_of(prepared)


def test_its_content_counts_and_not_its_place(config: DataConfig, tmp_path: Path) -> None:
    prepared = prepare(config, 1000)
    elsewhere = shutil.copyfile(tmp_path / "mine.json", tmp_path / "else.json")
    moved = dataclasses.replace(config, tokenizer=str(elsewhere))
    assert prepare(moved, 1000).folder == prepared.folder
    train_tokenizer((text_of(i) for i in range(600, 603)), 270).save(elsewhere)
    other = prepare(moved, 1000)
    assert other.folder != prepared.folder and other.digest != prepared.digest
    named = dataclasses.replace(config, document="<|document|>")
    assert prepare(named, 1000).digest == prepared.digest


def test_a_killed_preparation_goes_on(config: DataConfig) -> None:
    prepared = prepare(config, 1000)
    (prepared.folder / "manifest.json").unlink()
    (prepared.folder / "tokenizer.json").unlink()
    assert prepare(config, 1000).digest == prepared.digest


def test_one_that_does_not_fit_is_refused(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="280 tokens and the model's vocab is 279; set vocab to"):
        prepare(config, 279)
    absent = dataclasses.replace(config, tokenizer=str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match=r"absent\.json \(No such file"):
        prepare(absent, 1000)
    with pytest.raises(ValueError, match="has no <eos> token"):
        prepare(dataclasses.replace(config, document="<eos>"), 1000)
    with pytest.raises(ValueError, match=r"set that as well"):
        DataConfig(path="x", document="<eos>")
    assert not (tmp_path / "cache").exists()
    data = json.loads((tmp_path / "mine.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**data, "model": {"type": "none"}}))
    with pytest.raises(ValueError, match="is damaged"):
        prepare(config, 1000)
