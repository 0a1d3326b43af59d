"""A dataset folder by `hf:`: streamed once, capped, resumed, and trained from like any corpus."""

import json
from pathlib import Path

import pytest

from moebius.data import hub as hub_module
from moebius.data.config import DataConfig
from moebius.data.documents import open_corpus
from moebius.data.prepare import prepare

from .conftest import text_of

ROWS = 120


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [{"text": text_of(i)} for i in range(ROWS)] + [{"text": None}, {"text": ""}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines)
    return folder


def test_a_local_dataset_folder(dataset: Path, tmp_path: Path) -> None:
    prepared = prepare(DataConfig(path=f"hf:{dataset}", cache=str(tmp_path / "cache")), 300)
    texts = [*prepared.train_documents(), *prepared.heldout_documents()]
    assert sorted(text.decode() for _, text in texts) == sorted(text_of(i) for i in range(ROWS))
    skipped = prepared.manifest["sources"][0]["skipped"]
    assert {reason: n for reason, (n, _) in skipped.items()} == {
        "row without text": 1,
        "empty document": 1,
    }
    assert not list(prepared.folder.rglob("raw"))


def test_max_bytes_caps_the_text(dataset: Path, tmp_path: Path) -> None:
    config = DataConfig(path=f"hf:{dataset}", max_bytes=8000, cache=str(tmp_path / "cache"))
    prepared = prepare(config, 300)
    texts = [text for _, text in [*prepared.train_documents(), *prepared.heldout_documents()]]
    total = sum(map(len, texts))
    assert total <= 8000 < total + max(len(text_of(i).encode()) for i in range(ROWS))
    first = {text_of(i).encode() for i in range(len(texts))}
    assert set(texts) == first


def test_a_stopped_fetch_goes_on(dataset: Path, tmp_path: Path) -> None:
    corpus = open_corpus(f"hf:{dataset}")
    whole = hub_module.fetch(corpus, tmp_path / "whole", None, None, file_bytes=4000)

    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if done > 12_000:
            raise Stop

    with pytest.raises(Stop):
        hub_module.fetch(corpus, tmp_path / "again", None, stop, file_bytes=4000)
    before = sorted((tmp_path / "again").glob("*.jsonl"))
    assert 2 < len(before) < len(whole.files)
    times = [path.stat().st_mtime_ns for path in before]
    again = hub_module.fetch(corpus, tmp_path / "again", None, None, file_bytes=4000)
    assert [path.stat().st_mtime_ns for path in before] == times
    assert [file.path.read_bytes() for file in again.files] == [
        file.path.read_bytes() for file in whole.files
    ]


def test_a_dataset_without_text_writes_nothing(dataset: Path, tmp_path: Path) -> None:
    (dataset / "train.jsonl").write_text('{"title": "a"}\n{"title": "b"}\n')
    with pytest.raises(ValueError, match="has no text"):
        prepare(DataConfig(path=f"hf:{dataset}", cache=str(tmp_path / "cache")), 300)
    assert not (tmp_path / "cache").exists()


def test_a_dataset_of_one_row_leaves_nothing(dataset: Path, tmp_path: Path) -> None:
    (dataset / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="only one document"):
        prepare(DataConfig(path=f"hf:{dataset}", cache=str(tmp_path / "cache")), 300)
    assert list((tmp_path / "cache").iterdir()) == []
