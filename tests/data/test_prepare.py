"""Preparing end to end: nothing lost, nothing done twice, the same bytes however it was done."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moebius.data.config import DataConfig, Source
from moebius.data.corpus import split_of
from moebius.data.documents import digest, open_corpus
from moebius.data.prepare import prepare
from moebius.data.prepared import Prepared
from moebius.data.work import Meter, Work

from .conftest import text_of, write_folder


def all_texts(prepared: Prepared) -> dict[str, bytes]:
    return dict([*prepared.train_documents(), *prepared.heldout_documents()])


def test_every_document_is_kept_to_the_byte(prepared: Prepared) -> None:
    folder = Path(prepared.config.path)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.txt")}
    assert all_texts(prepared) == {key: path.read_bytes() for key, path in files.items()}
    held_out = {key for key, _ in prepared.heldout_documents()}
    assert held_out == {key for key in files if digest(key) % 10 == 0} and held_out
    source = prepared.manifest["sources"][0]
    assert source["train"]["documents"] + source["heldout"]["documents"] == len(files) == 60
    total = sum(len(text) for _, text in prepared.heldout_documents())
    assert prepared.bytes_per_token("heldout") == total / prepared.heldout[0].num_tokens
    for i in prepared.train[0].shards:
        text = files[prepared.train[0].shards.key(i)].read_bytes()
        assert prepared.train[0].shards.document_bytes(i) == len(text)


def test_library(tmp_path: Path) -> None:
    config = DataConfig(path="python:stdlib", max_bytes=600_000, cache=str(tmp_path))
    prepared = prepare(config, 512)
    root = open_corpus("python:stdlib").files[0].path.parent
    texts = all_texts(prepared)
    assert all((root / key).read_bytes() == text for key, text in texts.items())
    source = prepared.manifest["sources"][0]
    assert 50_000 < source["train"]["bytes"] + source["heldout"]["bytes"] <= 600_000
    assert source["skipped"]["file beyond data.max_bytes"][0] > 100


def test_a_second_call_reads_only_the_manifest(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", 20)
    config = DataConfig(path=str(folder), cache=str(tmp_path / "cache"))
    calls: list[tuple[str, int, int]] = []
    first = prepare(config, 300, progress=lambda *call: calls.append(call))
    assert {stage for stage, _, _ in calls} == {"tokenizer", "tokens"}
    size = sum(path.stat().st_size for path in folder.rglob("*.txt"))
    assert calls[-1] == ("tokens", size, size)
    calls.clear()
    for path in folder.rglob("*.txt"):
        status = path.stat()
        path.write_bytes(b"?" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = prepare(config, 300, progress=lambda *call: calls.append(call))
    assert calls == [] and second.digest == first.digest
    assert all_texts(second) == all_texts(first)
    (folder / "text-000.txt").write_bytes(b"changed")
    assert prepare(config, 300).folder != first.folder


def test_lost_shards_are_made_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", 20)
    config = DataConfig(path=str(folder), cache=str(tmp_path / "cache"))
    first = prepare(config, 300)
    shard = next((first.folder / "source-0" / "train").glob("*.bin"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-2])
    assert prepare(config, 300).digest == first.digest and shard.read_bytes() == data


def test_order_and_weights_do_not_prepare_again(tmp_path: Path) -> None:
    a, b = write_folder(tmp_path / "a", 20), write_folder(tmp_path / "b", 20, first=50)
    cache = str(tmp_path / "cache")
    first = prepare(DataConfig(sources=(Source(str(a)), Source(str(b))), cache=cache), 300)
    sources = (Source(str(a), 3.0), Source(str(b), 1.0, 2.0))
    assert prepare(DataConfig(sources=sources, seed=9, cache=cache), 300).folder == first.folder


def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    sources = tuple(
        Source(str(write_folder(tmp_path / f"{i}", 15, first=100 * i))) for i in range(5)
    )
    made = [
        prepare(DataConfig(sources=sources, cache=str(tmp_path / f"cache{n}"), workers=n), 300)
        for n in (1, 2, 5)
    ]
    assert len({prepared.digest for prepared in made}) == 1
    contents = [
        {path.relative_to(p.folder).as_posix(): path.read_bytes() for path in p.folder.rglob("*.*")}
        for p in made
    ]
    assert contents[0] == contents[1] == contents[2] and len(contents[0]) > 30


KILLED = """
import os, signal, sys
from moebius.data.config import DataConfig, Source
from moebius.data.prepare import prepare
calls = 0
def progress(stage, done, total):
    global calls
    calls += stage == sys.argv[2]
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
sources = tuple(Source(path) for path in sys.argv[4:])
prepare(DataConfig(sources=sources, cache=sys.argv[1], workers=1), 300, progress=progress)
"""


@pytest.mark.parametrize(("stage", "call"), [("tokenizer", 20), ("tokens", 4)])
def test_killed_and_resumed(tmp_path: Path, stage: str, call: int) -> None:
    folders = [str(write_folder(tmp_path / f"{i}", 15, first=100 * i)) for i in range(6)]
    cache = str(tmp_path / "cache")
    command = [sys.executable, "-c", KILLED, cache, stage, str(call), *folders]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    parts = {path: path.stat().st_mtime_ns for path in Path(cache).rglob("00000-*.json")}
    assert len(parts) == (0 if stage == "tokenizer" else 3)
    assert not list(Path(cache).rglob("manifest.json"))
    sources = tuple(Source(path) for path in folders)
    resumed = prepare(DataConfig(sources=sources, cache=cache), 300)
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    whole = prepare(DataConfig(sources=sources, cache=str(tmp_path / "whole")), 300)
    assert resumed.digest == whole.digest and resumed.manifest == whole.manifest


@pytest.mark.parametrize("max_bytes", [None, 30_000])
def test_a_large_file_is_resumed_between_its_parts(
    prepared: Prepared, tmp_path: Path, max_bytes: int | None
) -> None:
    lines = [json.dumps({"text": text_of(i)}) for i in range(200)]
    lines[50] = lines[120] = "{"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    config = DataConfig(path=str(tmp_path / "rows.jsonl"), max_bytes=max_bytes)
    corpus = open_corpus(config.path)
    split = split_of(corpus, config)

    class Stop(Exception):
        pass

    def work(folder: str, stop_at: float) -> list[dict]:
        def stop(stage: str, done: int, total: int) -> None:
            if done > stop_at:
                raise Stop

        meter = Meter(stop, "tokens", 100_000)
        args = (config, tmp_path / folder, prepared.tokenizer, np.dtype("uint16"), meter)
        return Work(*args, part_bytes=8000, batch_bytes=1500).sources([corpus], [split])

    whole = work("whole", float("inf"))
    assert len(whole[0]["parts"]) > 3
    for stop_at in (5_000, 15_000, 25_000):
        with pytest.raises(Stop):
            work("again", stop_at)
    assert work("again", float("inf")) == whole
    if max_bytes is None:
        assert whole[0]["skipped"]["corrupt jsonl line"][0] == 2
        assert whole[0]["train"]["documents"] + whole[0]["heldout"]["documents"] == 198
    else:
        assert whole[0]["train"]["bytes"] + whole[0]["heldout"]["bytes"] <= max_bytes


def bad_corpora(root: Path) -> dict[str, Path]:
    """Paths with no usable text in them."""
    contents = {
        "whitespace.txt": b"\n \n",
        "binary.txt": bytes(range(256)),
        "rows.jsonl": b'{"title": 1}\n{"title": 2}\n',
        "one.jsonl": b'{"text": "alone"}\n',
        "broken.jsonl.gz": b"\x1f\x8b\x08",
        "empty.md": b"",
    }
    for name, data in contents.items():
        (root / name).write_bytes(data)
    (root / "folder").mkdir()
    (root / "folder" / "a.txt").write_bytes(b"\xff\xff")
    return {name: root / name for name in [*contents, "folder", "nowhere"]}


def test_no_usable_text_is_said_and_nothing_written(tmp_path: Path) -> None:
    for path in bad_corpora(tmp_path).values():
        for config in (
            DataConfig(path=str(path), cache=str(tmp_path / "cache")),
            DataConfig(
                sources=(Source("python:stdlib"), Source(str(path))),
                cache=str(tmp_path / "cache"),
            ),
        ):
            with pytest.raises(ValueError, match=r"data\.path") as caught:
                prepare(config, 300)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", 5)
    (tmp_path / "file").touch()
    config = DataConfig(path=str(folder), cache=str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match="cannot write to"):
        prepare(config, 300)
    with pytest.raises(ValueError, match="257"):
        prepare(DataConfig(path=str(folder), cache=str(tmp_path / "cache")), 100)
    assert not (tmp_path / "cache").exists()


def test_a_messy_folder_is_read_and_counted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", 20)
    big = "".join(f"line {i}\n" for i in range(60_000))
    (folder / "big.txt").write_text(big)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.py").touch()
    (folder / "picture.png").write_bytes(b"png")
    (folder / "rows.jsonl").write_text('{"text": "good row"}\n{"text": "bad row\n')
    config = DataConfig(path=str(folder), max_document_bytes=50_000, cache=str(tmp_path / "cache"))
    prepared = prepare(config, 300)
    source = prepared.manifest["sources"][0]
    assert source["skipped"] == {
        "corrupt jsonl line": [1, 18],
        "empty document": [1, 0],
        "invalid UTF-8": [1, 4],
        "unknown kind of file": [1, 0],
    }
    assert source["split"] == 1
    texts = all_texts(prepared)
    parts = [key for key in texts if key.startswith("big.txt~")]
    ordered = sorted(parts, key=lambda key: int(key.split("~")[1]))
    assert b"".join(texts[key] for key in ordered) == big.encode()
    assert len({key in dict(prepared.heldout_documents()) for key in parts}) == 1
    assert texts["rows.jsonl#0"] == b"good row" and len(texts) == 21 + len(parts)


def test_a_lone_file_has_a_held_out_part(tmp_path: Path) -> None:
    text = "\n\n".join(text_of(i) for i in range(200))
    (tmp_path / "book.txt").write_bytes(text.encode())
    prepared = prepare(DataConfig(path=str(tmp_path / "book.txt"), cache=str(tmp_path / "c")), 300)
    texts = all_texts(prepared)
    ordered = sorted(texts, key=lambda key: int(key.split("#")[1]))
    assert b"".join(texts[key] for key in ordered) == text.encode()
    assert prepared.heldout[0].shards.num_documents >= 1


def test_a_large_vocabulary_takes_four_bytes_a_token(prepared: Prepared, tmp_path: Path) -> None:
    config = DataConfig(path=prepared.config.path)
    corpus = open_corpus(config.path)
    meter = Meter(None, "tokens", 1)
    work = Work(config, tmp_path, prepared.tokenizer, np.dtype("uint32"), meter)
    parts = work.sources([corpus], [split_of(corpus, config)])[0]["parts"]
    size = (tmp_path / "source-0" / "train" / f"{parts[0]['name']}.bin").stat().st_size
    assert size == 4 * prepared.train[0].num_tokens
