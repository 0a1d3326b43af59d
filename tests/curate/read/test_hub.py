"""Datasets through the `datasets` library: a folder, one saved to disk, shards, what is wrong."""

import json
from pathlib import Path

import pytest

from moebius.curate.read.hub import Hub
from moebius.curate.read.row import Fields

from .reading import read_all, reasons

datasets = pytest.importorskip("datasets", reason="needs the data extra")
ROWS = [{"text": f"text {i}", "url": f"http://a.example/{i}"} for i in range(40)]
BAD = [{"text": None, "url": ""}, {"text": " ", "url": ""}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    for i in range(4):
        rows = ROWS[10 * i : 10 * i + 10] + (BAD if i == 2 else [])
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"train-{i}.jsonl").write_text(lines)
    return folder


@pytest.mark.parametrize("prefix", ["hf:", ""])
def test_a_folder_in_shards(folder: Path, prefix: str) -> None:
    reader = Hub(path=f"{prefix}{folder}", name="set")
    tasks, passed = reader.tasks(1)
    assert [task.files for task in tasks] == [(f"0000{i}-of-00004",) for i in range(4)]
    documents, unread = read_all(reader)
    assert [(d.text, d.url) for d in documents] == [(row["text"], row["url"]) for row in ROWS]
    assert documents[10].key == "00001-of-00004#0" and not passed
    assert reasons(unread) == {"row without text": 1, "empty document": 1}


def test_one_saved_to_disk(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    documents, unread = read_all(Hub(path=f"hf:{tmp_path / 'saved'}", fields=Fields(url="")))
    assert [(d.text, d.url) for d in documents] == [(row["text"], "") for row in ROWS]
    assert not unread


def test_damage_in_a_shard_is_counted(folder: Path) -> None:
    (folder / "train-1.jsonl").write_text('{"text": "a", "url": ""}\n{"text": \n')
    documents, unread = read_all(Hub(path=str(folder)))
    assert [d.text for d in documents][-20:] == [row["text"] for row in ROWS[20:]]
    assert reasons(unread)["damaged or unreachable dataset"] == 1


def test_mistakes_of_the_user(folder: Path) -> None:
    for path in ("", "hf:", "hf:name", "hf:./a/b"):
        with pytest.raises(ValueError, match="neither hf:OWNER/NAME nor a folder"):
            Hub(path=path).tasks(1)
    with pytest.raises(ValueError, match="has no field body, only text, url"):
        Hub(path=str(folder), fields=Fields(text="body")).tasks(1)
    with pytest.raises(ValueError, match="not both"):
        Hub(fields=Fields(text="a", html="b"))
