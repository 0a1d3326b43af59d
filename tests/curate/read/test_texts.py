"""Plain files: encodings told apart, large ones cut and none of it lost, binary ones counted."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.curate.read import LIMIT
from moebius.curate.read.texts import Texts

from .reading import packed, read_all, reasons, shared

WORDS = "Größe, naïve café, “quoted” … 数学 и слова\r\n\x0cnext page\tend\n"


def test_books_are_read_to_the_character() -> None:
    folder = shared("text")
    documents, unread = read_all(Texts(path=str(folder), name="books"))
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.txt"))
    assert [d.key for d in documents] == paths and len(paths) > 20 and not unread
    assert all(d.text.encode() == (folder / d.key).read_bytes() for d in documents)
    assert {d.kind for d in documents} == {"prose"} and not any(d.raw for d in documents)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be with a mark"]
)
def test_encodings_of_unicode(tmp_path: Path, encoding: str, ending: str) -> None:
    text = WORDS * 5000
    data = b"\xfe\xff" + text.encode("utf-16-be") if " " in encoding else text.encode(encoding)
    (tmp_path / f"a.txt{ending}").write_bytes(packed(data, ending))
    documents, unread = read_all(Texts(path=str(tmp_path)))
    assert [(d.key, d.text) for d in documents] == [(f"a.txt{ending}", text)] and not unread


def test_other_encodings_are_taken_for_windows_1252(tmp_path: Path) -> None:
    text = "Größe, naïve café, “quoted” … 10 €\n"
    (tmp_path / "a.txt").write_bytes(text.encode("cp1252") + b"\x81\x8d\x8f\x90\x9d")
    (tmp_path / "b.txt").write_bytes(text.encode("latin-1", "ignore"))
    documents, _ = read_all(Texts(path=str(tmp_path)))
    assert documents[0].text == text + "\x81\x8d\x8f\x90\x9d"
    assert documents[1].text == text.encode("latin-1", "ignore").decode("latin-1")


def test_few_invalid_bytes_in_utf8_cost_only_themselves(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(WORDS.encode() * 9 + b"\xff" + WORDS.encode())
    documents, _ = read_all(Texts(path=str(tmp_path)))
    assert documents[0].text == WORDS * 9 + "\ufffd" + WORDS


def test_nuls_pass_and_binary_files_do_not(tmp_path: Path) -> None:
    text = "a" * 500 + "\0\x01" + "b" * 500
    files = {"a.txt": text.encode(), "b.txt": b"\0" * 99, "c.md": bytes(range(256)) * 99}
    files |= {"d.txt": b"ab\0" * 99, "e.txt": ("\x02" * 99).encode("utf-16")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    documents, unread = read_all(Texts(path=str(tmp_path)))
    assert [(d.key, d.text) for d in documents] == [("a.txt", text)]
    assert reasons(unread) == {"binary file": 4}


def test_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    good = WORDS.encode() * 9000
    files = {
        "empty document": [("a.txt", b""), ("b.md.gz", gzip.compress(b"\n \n")), ("c.rst", b"\n")],
        "damaged compressed file": [
            ("d.txt.gz", gzip.compress(good)[:-40]),
            ("e.txt.zst", packed(good, ".zst")[:-20]),
            ("f.txt.gz", gzip.compress(good) + b"trailing"),
        ],
        "unknown kind of file": [("g.doc", b"a")],
    }
    for name, data in [pair for pairs in files.values() for pair in pairs]:
        (tmp_path / name).write_bytes(data)
    documents, unread = read_all(Texts(path=str(tmp_path)))
    assert not documents
    assert reasons(unread) == {reason: len(pairs) for reason, pairs in files.items()}


def check_pieces(folder: Path, text: str, data: bytes, name: str = "a.txt") -> list[str]:
    (folder / name).write_bytes(packed(data, name))
    documents, unread = read_all(Texts(path=str(folder)))
    assert not unread and "".join(d.text for d in documents) == text
    assert [d.key for d in documents] == [f"{name}~{i}" for i in range(len(documents))]
    assert all(len(d.text.encode()) <= LIMIT for d in documents)
    return [d.text for d in documents]


def test_a_collection_is_cut_between_paragraphs(tmp_path: Path) -> None:
    paragraph = "A line of prose, and more of it.\nÜber die Brücke.\n\n"
    text = paragraph * (LIMIT // len(paragraph.encode()) + 1000)
    pieces = check_pieces(tmp_path, text, text.encode(), "a.txt.gz")
    assert len(pieces) == 2 and pieces[0].endswith("\n\n")


def test_a_line_above_the_limit_is_cut_between_characters(tmp_path: Path) -> None:
    text = "word é数 " * (LIMIT // 9)
    assert len(check_pieces(tmp_path, text, text.encode("utf-16"))) == 2


def test_blank_pieces_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text\n" + b"\n" * (2 * LIMIT))
    documents, unread = read_all(Texts(path=str(tmp_path)))
    assert [d.key for d in documents] == ["a.txt~0"]
    assert reasons(unread) == {"empty document": 2}


def test_a_text_of_exactly_the_limit_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"word\n" * (LIMIT // 5) + b"x" * (LIMIT % 5))
    assert [d.key for d in read_all(Texts(path=str(tmp_path)))[0]] == ["a.txt"]


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_document_or_counted(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_bytes(data)
    documents, unread = read_all(Texts(path=str(folder)))
    assert len(documents) + len(unread) == 1
