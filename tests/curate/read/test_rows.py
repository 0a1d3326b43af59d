"""Rows of JSON lines and parquet: their fields, and each that cannot be read counted apart."""

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.curate.document import Document, Unread
from moebius.curate.read import LIMIT
from moebius.curate.read.row import Fields
from moebius.curate.read.rows import Rows

from .reading import packed, page, read_all, reasons, shared


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(folder: Path, rows: list[dict[str, Any]], ending: str, row_group: int = 100) -> Path:
    path = folder / f"a{ending}"
    if ending == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="needs the curate extra")
        from pyarrow import parquet

        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, path, row_group_size=row_group, compression="zstd")
    else:
        path.write_bytes(packed(jsonl(rows), ending))
    return path


ENDINGS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_rows_of_every_format(tmp_path: Path, ending: str) -> None:
    rows = [
        {"text": f"text {i} é\0数", "url": f"http://a.example/{i}", "date": "2024-01-02"}
        for i in range(250)
    ]
    write(tmp_path, rows, ending)
    documents, unread = read_all(Rows(path=str(tmp_path), name="rows", kind="prose"))
    assert [(d.text, d.url, d.date) for d in documents] == [tuple(row.values()) for row in rows]
    assert [d.key for d in documents] == [f"a{ending}#{i}" for i in range(250)] and not unread
    assert {d.kind for d in documents} == {"prose"}


def test_named_fields(tmp_path: Path) -> None:
    row = {"body": "a", "link": "<http://a.example/>", "when": "2024-01-02 03:04:05", "l": "en"}
    write(tmp_path, [row | {"n": 7, "text": "not this"}], ".jsonl")
    reader = Rows(
        path=str(tmp_path),
        fields=Fields(text="body", url="link", date="when", language="l", id="n"),
    )
    (document,) = read_all(reader)[0]
    assert document == Document(
        "a.jsonl#0",
        "a",
        url="http://a.example/",
        date="2024-01-02T03:04:05",
        language="eng",
        labels={"id": "7"},
    )
    with pytest.raises(ValueError, match="not both"):
        Rows(fields=Fields(text="a", html="b"))


@pytest.mark.parametrize("ending", ENDINGS)
def test_pages_in_rows(tmp_path: Path, ending: str) -> None:
    write(tmp_path, [{"html": page(str(i)).decode()} for i in range(3)], ending)
    documents, _ = read_all(Rows(path=str(tmp_path), fields=Fields(html="html")))
    assert [(d.raw, d.text) for d in documents] == [(page(str(i)), "") for i in range(3)]


def test_cells_of_bytes_and_times(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 1, 2, 3, 4, 5)
    write(tmp_path, [{"html": b"<p>\xff", "date": when, "url": None}], ".parquet")
    (document,) = read_all(Rows(path=str(tmp_path), fields=Fields(html="html")))[0]
    assert (document.raw, document.date, document.url) == (b"<p>\xff", "2024-01-02T03:04:05", "")


def test_content_stands_in_for_text(tmp_path: Path) -> None:
    write(tmp_path, [{"content": "a"}, {"content": "b", "text": "c"}, {"text": None}], ".jsonl")
    documents, unread = read_all(Rows(path=str(tmp_path)))
    assert [d.text for d in documents] == ["a", "c"] and reasons(unread) == {"row without text": 1}


def test_odd_values_of_other_fields_do_no_harm(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a", "url": 7, "date": 2024, "language": "tlhIngan Hol!"},
        {"text": "b", "url": "\ud800", "date": "last May", "language": ["en"]},
        {"text": "c \ud83d\ude00 \ud800", "url": "http://x.example/" + "y" * 99_999},
    ]
    write(tmp_path, rows, ".jsonl")
    documents, unread = read_all(Rows(path=str(tmp_path), fields=Fields(id="id")))
    assert [d.text for d in documents] == ["a", "b", "c \U0001f600 \ufffd"] and not unread
    assert [(d.date, d.language, dict(d.labels)) for d in documents] == [("", "", {})] * 3
    assert len(documents[2].url) == 8192


BAD_LINES: dict[str, list[bytes]] = {
    "row without text": [b"{}", b"[]", b"3", b'{"text": 3}', b'{"text": null, "content": ["a"]}'],
    "corrupt line": [b"{", b'{"text": "a"} x', b"[" * 100_000, b'{"text": "a\nb"}'],
    "invalid UTF-8": [b'{"text": "\xff"}'],
    "empty document": [b'{"text": ""}', b'{"text": " \\n"}'],
    "document above 16 MiB": [json.dumps({"text": "word " * (LIMIT // 4)}).encode()],
    "line above 32 MiB": [json.dumps({"text": "a", "b": "word " * (LIMIT // 2)}).encode()],
}


@pytest.mark.parametrize("reason", BAD_LINES)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_bad_lines_are_counted_and_passed(tmp_path: Path, reason: str, ending: str) -> None:
    good = json.dumps({"text": "good"}).encode()
    lines = BAD_LINES[reason]
    data = b"\n".join([good, *lines, b"", b" \r", good])
    (tmp_path / f"a.jsonl{ending}").write_bytes(packed(data, ending))
    documents, unread = read_all(Rows(path=str(tmp_path)))
    assert [d.text for d in documents] == ["good"] * 2
    # A line broken in two is two of them.
    assert reasons(unread) == {reason: len(lines) + (reason == "corrupt line")}


def test_a_row_of_exactly_the_limit(tmp_path: Path) -> None:
    write(tmp_path, [{"text": "a" * LIMIT}, {"text": "a" * (LIMIT + 1)}], ".jsonl")
    documents, unread = read_all(Rows(path=str(tmp_path)))
    assert len(documents[0].text) == LIMIT and reasons(unread) == {"document above 16 MiB": 1}


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_rows_before_damage_are_kept(tmp_path: Path, ending: str) -> None:
    rows = [{"text": f"{i} " + hex(3**200 * (i + 7))} for i in range(9000)]
    data = write(tmp_path, rows, ending).read_bytes()
    (tmp_path / f"a{ending}").write_bytes(data[: len(data) // 2])
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"text": "after"}]))
    documents, unread = read_all(Rows(path=str(tmp_path)))
    kept = len(documents) - 1
    assert [d.text for d in documents] == [row["text"] for row in rows[:kept]] + ["after"]
    assert 1000 < kept < 9000 and reasons(unread) == {"damaged compressed file": 1}


def test_files_that_are_nothing(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "e.parquet").write_bytes(b"PAR1" + bytes(99) + b"PAR1")
    (tmp_path / "f.txt").write_bytes(b"text")
    _, unread = read_all(Rows(path=str(tmp_path)))
    assert reasons(unread) == {
        "empty document": 3,
        "damaged parquet file": 2,
        "unknown kind of file": 1,
    }


def test_a_parquet_without_the_column(tmp_path: Path) -> None:
    write(tmp_path, [{"title": "a"}, {"title": "b"}], ".parquet")
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"text": "after"}]))
    documents, unread = read_all(Rows(path=str(tmp_path)))
    assert [d.text for d in documents] == ["after"]
    assert [(u.key, u.reason) for u in unread] == [("a.parquet", "parquet file without the column")]


def test_cells_that_are_no_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the curate extra")
    from pyarrow import parquet

    values = pyarrow.array([b"a", None, b"\xff\xfe", b" ", b"x" * (LIMIT + 1), b"b"])
    text = pyarrow.StringArray.from_buffers(6, *values.buffers()[1:], values.buffers()[0])
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    documents, unread = read_all(Rows(path=str(tmp_path)))
    assert [(d.key, d.text) for d in documents] == [("a.parquet#0", "a"), ("a.parquet#5", "b")]
    assert [(u.key[-1], u.reason) for u in unread] == [
        ("1", "row without text"),
        ("2", "invalid UTF-8"),
        ("3", "empty document"),
        ("4", "document above 16 MiB"),
    ]


def test_a_damaged_row_group_costs_its_rows(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs the curate extra")
    from pyarrow import parquet

    rows = [{"text": f"{i} " + hex(7**300 * (i + 1))} for i in range(400)]
    path = write(tmp_path, rows, ".parquet")
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    first = column.dictionary_page_offset or column.data_page_offset
    data[first : first + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    documents, unread = read_all(Rows(path=str(path)))
    texts = [row["text"] for row in rows]
    assert [d.text for d in documents] == texts[:100] + texts[200:]
    assert reasons(unread) == {"damaged row group": 1}
    assert [d.key for d in documents[99:101]] == ["a.parquet#99", "a.parquet#200"]


def test_row_groups_that_swell_are_not_decoded(tmp_path: Path) -> None:
    rows = [{"text": "a" * (40 << 20)}]
    write(tmp_path, rows, ".parquet")
    _, unread = read_all(Rows(path=str(tmp_path)))
    assert [(u.key, u.reason) for u in unread] == [("a.parquet#0", "document above 16 MiB")]


def test_a_public_benchmark_in_lines() -> None:
    path = shared("eval/humaneval/HumanEval.jsonl.gz")
    documents, unread = read_all(Rows(path=str(path), fields=Fields(text="prompt", id="task_id")))
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert [(d.text, d.labels["id"]) for d in documents] == [
        (row["prompt"], row["task_id"]) for row in rows
    ]
    assert len(documents) == 164 and not unread


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_damage_to_parquet_is_never_fatal(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """The footer or anything before it cut off: rows, or a count of what is not there."""
    folder = tmp_path_factory.mktemp("rows")
    path = write(folder, [{"text": f"text {i}"} for i in range(50)], ".parquet", 20)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    documents, unread = read_all(Rows(path=str(folder)))
    assert not documents and reasons(unread) == {"damaged parquet file": 1}


def test_items_are_as_many_as_lines(tmp_path: Path) -> None:
    lines = [line for lines in list(BAD_LINES.values())[:4] for line in lines] * 3
    lines = [line for line in lines if b"\n" not in line] + [b'{"text": "a"}'] * 5
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    documents, unread = read_all(Rows(path=str(tmp_path)))
    assert len(documents) + len(unread) == len(lines)
    assert sorted([*unread, *documents], key=lambda item: int(item.key.split("#")[1])) is not None
    assert all(isinstance(item, Unread) for item in unread)
