"""Every kind of file, whole and damaged: what can be used is read, the rest is counted."""

import gzip
import json
import random
import tempfile
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from moebius.data.documents import Document, File, Tally
from moebius.data.readers import read

LIMIT = 1 << 20


def read_all(
    path: Path, limit: int = LIMIT, piece: int | None = None
) -> tuple[list[Document], Tally]:
    tally = Tally()
    file = File(path.name, path, path.stat().st_size, 0)
    return list(read(file, tally, limit, piece)), tally


def rows(count: int) -> bytes:
    fields = (
        {"text": f"text {i}\r\n\x00é"} if i % 2 else {"content": f"c{i}"} for i in range(count)
    )
    return b"".join(json.dumps(row).encode() + b"\n" for row in fields)


def reasons(tally: Tally) -> dict[str, int]:
    return {reason: count for reason, (count, _) in tally.skipped.items()}


def test_plain_text_is_kept_to_the_byte(tmp_path: Path) -> None:
    data = "\ufeffline\r\nnext\rlast\x00 é 数".encode()
    (tmp_path / "a.md").write_bytes(data)
    documents, tally = read_all(tmp_path / "a.md")
    assert [(d.key, d.text.encode(), d.origin) for d in documents] == [("a.md", data, "a.md")]
    assert tally == Tally()


@pytest.mark.parametrize("position", [0, 5000, (1 << 20) - 1, (1 << 20) + 7])
def test_invalid_utf8_skips_the_whole_file(tmp_path: Path, position: int) -> None:
    data = bytearray(b"word\n" * 300_000)
    data[position] = 0xFF
    (tmp_path / "a.txt").write_bytes(data)
    documents, tally = read_all(tmp_path / "a.txt")
    assert documents == [] and tally.skipped == {"invalid UTF-8": [1, 1_500_000]}


def test_a_character_across_two_blocks_is_valid(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" + "é数".encode() * 400_000)
    documents, tally = read_all(tmp_path / "a.txt", limit=4 << 20)
    assert len(documents) == 1 and not tally.skipped
    (tmp_path / "a.txt").write_bytes("é".encode() * 10 + b"\xe6\x95")
    assert reasons(read_all(tmp_path / "a.txt")[1]) == {"invalid UTF-8": 1}


@pytest.mark.parametrize("data", [b"", b" \n\t\n"])
def test_empty_document_is_counted(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    documents, tally = read_all(tmp_path / "a.txt")
    assert documents == [] and tally.skipped == {"empty document": [1, len(data)]}


def test_large_document_is_split_at_line_ends_and_kept_whole(tmp_path: Path) -> None:
    text = "".join(f"line {i} é\n" * (i % 50) for i in range(2000))
    (tmp_path / "a.txt").write_text(text)
    documents, tally = read_all(tmp_path / "a.txt", limit=10_000)
    assert "".join(document.text for document in documents) == text
    assert all(len(d.text.encode()) <= 10_000 and d.text.endswith("\n") for d in documents)
    assert {document.origin for document in documents} == {"a.txt"}
    assert [d.key for d in documents] == [f"a.txt~{i}" for i in range(len(documents))]
    assert tally.split == 1 and not tally.skipped


@settings(deadline=None)
@given(st.text(min_size=1, max_size=400), st.sampled_from([None, 64, 100]))
def test_any_text_survives_the_cutting(text: str, piece: int | None) -> None:
    if not text.strip() or any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.txt")
        path.write_bytes(text.encode())
        documents, _ = read_all(path, limit=64, piece=piece)
        row = Path(folder, "b.jsonl")
        row.write_text(json.dumps({"text": text}))
        in_row, _ = read_all(row, limit=64)
    for cut, limit in ((documents, min(piece or 64, 64)), (in_row, 64)):
        assert "".join(document.text for document in cut) == text
        assert all(0 < len(document.text.encode()) <= limit for document in cut)


def test_lone_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "word word word\nword\n\n"
    (tmp_path / "a.txt").write_text(paragraph * 200)
    documents, tally = read_all(tmp_path / "a.txt", piece=512)
    assert all(document.text.endswith("\n\n") for document in documents)
    assert {document.key for document in documents} == {d.origin for d in documents}
    assert documents[3].key == "a.txt#3" and tally == Tally()


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_rows(tmp_path: Path, ending: str) -> None:
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(ending[6:], bytes)
    path = tmp_path / f"a.{ending}"
    path.write_bytes(pack(rows(3)) + pack(b"\n" + rows(2)))
    documents, tally = read_all(path)
    texts = ["c0", "text 1\r\n\x00é", "c2", "c0", "text 1\r\n\x00é"]
    assert [document.text for document in documents] == texts
    assert [document.key for document in documents] == [f"{path.name}#{i}" for i in (0, 1, 2, 4, 5)]
    assert tally == Tally()


def test_bad_rows_are_counted_and_the_others_kept(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut sho',
        b'{"text": "\xff\xfe"}',
        b'{"title": "no text"}',
        b'{"text": 7}',
        b'["text"]',
        b'{"text": ""}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": "also good"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    documents, tally = read_all(tmp_path / "a.jsonl")
    assert [document.text for document in documents] == ["good", "also good"]
    assert reasons(tally) == {
        "corrupt jsonl line": 2,
        "invalid UTF-8": 1,
        "row without text": 3,
        "empty document": 1,
        "text that is not valid Unicode": 1,
    }


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_damaged_compressed_file_keeps_the_rows_before(
    tmp_path: Path, ending: str, damage: str
) -> None:
    rng = random.Random(0)
    lines = [json.dumps({"text": str(rng.random())}).encode() + b"\n" for _ in range(20_000)]
    pack = {"gz": gzip.compress, "zst": zstandard.compress}[ending]
    data = b"".join(pack(b"".join(lines[i : i + 5000])) for i in range(0, 20_000, 5000))
    middle = len(data) * 3 // 5
    data = data[:middle] + (b"" if damage == "truncated" else b"\x55" * (len(data) - middle))
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(data)
    documents, tally = read_all(path)
    texts = [json.loads(line)["text"] for line in lines]
    assert len(documents) > 9_000 and (damage != "truncated" or len(documents) < 13_000)
    assert [document.text for document in documents[:9_000]] == texts[:9_000]
    damaged = "damaged compressed file (rows before the damage kept)"
    assert reasons(tally)[damaged] == 1


def test_not_gzip_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(rows(3))
    documents, tally = read_all(tmp_path / "a.jsonl.gz")
    assert documents == [] and sum(reasons(tally).values()) == 1


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    bad = pyarrow.StringArray.from_buffers(
        1, pyarrow.array([0, 2], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff\xfe")
    )
    good = pyarrow.array(["one", None, "", "two\r\n"])
    table = pyarrow.table({"text": pyarrow.chunked_array([good, bad]), "id": [1, 2, 3, 4, 5]})
    parquet.write_table(table, path)
    documents, tally = read_all(path)
    assert [(d.key, d.text) for d in documents] == [
        ("a.parquet#0", "one"),
        ("a.parquet#3", "two\r\n"),
    ]
    assert reasons(tally) == {"row without text": 1, "empty document": 1, "invalid UTF-8": 1}


def test_parquet_damaged_or_without_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2]}), path)
    assert reasons(read_all(path)[1]) == {"parquet file without text": 1}
    path.write_bytes(path.read_bytes()[:-20])
    damaged = "damaged parquet file (rows before the damage kept)"
    assert reasons(read_all(path)[1]) == {damaged: 1}


def test_a_file_that_is_gone_is_counted(tmp_path: Path) -> None:
    tally = Tally()
    assert list(read(File("a.txt", tmp_path / "a.txt", 5, 0), tally, LIMIT)) == []
    assert tally.skipped == {"unreadable file": [1, 5]}


def test_an_overlong_line_is_skipped_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"text": "before"}\n{"text": "')
        for _ in range(70):
            stream.write(b"x" * (1 << 20))
        stream.write(b'"}\n{"text": "after"}\n')
    documents, tally = read_all(path)
    assert [(d.key, d.text) for d in documents] == [("a.jsonl#0", "before"), ("a.jsonl#2", "after")]
    assert tally.skipped == {"line above 64 MiB": [1, (70 << 20) + 13]}
