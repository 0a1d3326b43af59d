"""Folders of HTML files: addresses, compression, what is no page, odd names and links."""

import dataclasses
import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest

from moebius.curate.document import Document, Unread
from moebius.curate.read import LIMIT
from moebius.curate.read.pages import Pages
from moebius.curate.read.sniff import not_html, page_url

from .reading import packed, page, read_all, reasons, shared


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_the_pages_of_a_benchmark_with_their_addresses() -> None:
    folder = shared("web/article-extraction-benchmark")
    gold = json.loads((folder / "ground-truth.json").read_text(encoding="utf-8"))
    reader = Pages(path=str(folder / "html"), urls=str(folder / "ground-truth.json"), name="web")
    documents, unread = read_all(reader)
    assert not unread and len(documents) == 120
    for document in documents:
        stem = document.key.removesuffix(".html.gz")
        assert document.url == gold[stem]["url"]
        assert document.raw == gzip.decompress((folder / "html" / document.key).read_bytes())
        assert (document.text, document.kind, document.source) == ("", "web", "web")


def test_every_ending_in_order(tmp_path: Path) -> None:
    names = ["b/c.HTM", "b.html", "a.xhtml.zst", "b/a.html.gz", "B.htm.gz"]
    write(tmp_path, {name: packed(page(name), name) for name in names})
    documents, unread = read_all(Pages(path=str(tmp_path)))
    assert [d.key for d in documents] == sorted(names) and not unread
    assert all(d.raw == page(d.key) for d in documents)
    assert read_all(Pages(path=str(tmp_path)), 1)[0] == documents


def test_one_file_is_a_source(tmp_path: Path) -> None:
    write(tmp_path, {"a.html": page("a"), "b.html": page("b")})
    documents, _ = read_all(Pages(path=str(tmp_path / "a.html")))
    assert [d.key for d in documents] == ["a.html"]


def test_what_is_no_page_is_counted(tmp_path: Path) -> None:
    good = {"good.html": page("a"), "plain.html": b"text without a tag", "nul.html": b"<p>a\0b</p>"}
    bad = {
        "empty document": {"a.html": b"", "b.html": b" \n", "c.html.gz": gzip.compress(b"")},
        "not HTML: PDF": {"d.html": b"%PDF-1.7"},
        "not HTML: image": {"e.html": b"\xff\xd8\xff\xe0"},
        "not HTML: binary": {"f.html": bytes(range(256)) * 9},
        "damaged compressed file": {
            "g.html.gz": gzip.compress(page("a"))[:-9],
            "h.html.zst": packed(page("a"), ".zst")[:-2],
            "i.html.gz": b"\x1f\x8b\x08" + b"x" * 99,
        },
        "decompresses to more than the limit": {
            "j.html.gz": packed(page("a" * LIMIT), ".gz"),
            "k.html.zst": packed(page("a" * LIMIT), ".zst"),
        },
        "document above 16 MiB": {"l.html": page("a" * LIMIT)},
        "unknown kind of file": {"m.js": b"", "n": b""},
        "hidden file or folder": {".o.html": b"", ".p/q.html": b"", ".p/r.html": b""},
    }
    write(tmp_path, {name: data for files in [good, *bad.values()] for name, data in files.items()})
    documents, unread = read_all(Pages(path=str(tmp_path)))
    assert {d.key: d.raw for d in documents} == good
    expected = {reason: len(files) for reason, files in bad.items()}
    assert reasons(unread) == expected | {"hidden file or folder": 2}
    assert (
        sorted(u.reason for u in unread if u.key in bad["damaged compressed file"])
        == ["damaged compressed file"] * 3
    )


def test_links_and_odd_files_do_not_lead_astray(tmp_path: Path) -> None:
    write(tmp_path, {"in/a.html": page("a")})
    (tmp_path / "in/up").symlink_to("..")
    (tmp_path / "in/self.html").symlink_to("self.html")
    (tmp_path / "in/b.html").symlink_to("a.html")
    os.mkfifo(tmp_path / "in/pipe.html")
    odd = os.fsdecode(b"caf\xe9.html")
    (tmp_path / "in" / odd).write_bytes(page("odd"))
    documents, unread = read_all(Pages(path=str(tmp_path / "in")))
    assert [d.key for d in documents] == ["a.html", "b.html", "caf\\udce9.html"]
    assert {u.key: u.reason for u in unread} == {
        "up": "link to a folder",
        "self.html": "unreadable file",
        "pipe.html": "not a regular file",
    }


def test_a_file_gone_since_it_was_listed(tmp_path: Path) -> None:
    write(tmp_path, {"a.html": page("a"), "b.html": page("b")})
    reader = Pages(path=str(tmp_path))
    (task,) = reader.tasks(1 << 20)[0]
    (tmp_path / "a.html").unlink()
    first, second = reader.read(task)
    assert (first.key, second.key) == ("a.html", "b.html")
    assert isinstance(first, Unread) and first.reason == "unreadable file"
    assert isinstance(second, Document)


def test_folders_nested_without_end(tmp_path: Path) -> None:
    deep = "d/" * 1100
    for depth in range(1, 1101):
        os.mkdir(f"{tmp_path}/{'d/' * depth}")
    (tmp_path / deep / "a.html").write_bytes(page("a"))
    documents, unread = read_all(Pages(path=str(tmp_path)))
    # What removes the folders of tests would go too deep.
    subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)
    assert [d.key for d in documents] == [deep + "a.html"] and not unread


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": "nowhere"}, "no such file"),
        ({"urls": "nowhere.json"}, "cannot read"),
        ({"urls": "list.json"}, "must hold one object"),
        ({"urls": "broken.json"}, "as JSON"),
        ({"path": "void"}, "looked for .html"),
        ({"path": ""}, "has no path"),
    ],
)
def test_mistakes_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"in/a.html": page("a"), "list.json": b"[]", "broken.json": b"{"})
    (tmp_path / "void").mkdir()
    reader = dataclasses.replace(Pages(path="in"), **change)
    with pytest.raises(ValueError, match=words) as raised:
        reader.tasks(1 << 20)
    assert "\n" not in str(raised.value)


LINKS = {
    b"<link rel=canonical href=http://a.example/b>": "http://a.example/b",
    b"<LINK HREF='https://a.example/?a=1&amp;b' REL='canonical'/>": "https://a.example/?a=1&b",
    b'<meta property="og:url" content="https://a.example/o">': "https://a.example/o",
    b'<meta property="og:url" content="https://a/"><link rel="canonical" href="https://c/">': (
        "https://c/"
    ),
    b'<link rel="canonical" href="/relative">': "",
    b'<link rel="canonical" href="javascript:alert(1)">': "",
    b'<link rel="alternate" href="https://a.example/" title="canonical">': "",
    b"<link rel=canonical>": "",
    b" " * (64 << 10) + b"<link rel=canonical href=http://late.example>": "",
}


@pytest.mark.parametrize(("head", "url"), LINKS.items())
def test_a_page_names_its_address(tmp_path: Path, head: bytes, url: str) -> None:
    write(tmp_path, {"a.html": b"<html>" + head + page("a")})
    assert read_all(Pages(path=str(tmp_path)))[0][0].url == url


def test_given_addresses_come_first_and_may_be_short(tmp_path: Path) -> None:
    linked = b"<link rel=canonical href=http://own.example/>"
    write(
        tmp_path, {"in/a.html": linked, "in/x/b.htm.gz": gzip.compress(linked), "in/c.html": linked}
    )
    urls = {"a": {"url": "http://given.example/a"}, "x/b": "http://given.example/b", "c": None}
    write(tmp_path, {"urls.json": json.dumps(urls).encode()})
    documents, _ = read_all(Pages(path=str(tmp_path / "in"), urls=str(tmp_path / "urls.json")))
    assert [d.url for d in documents] == [
        "http://given.example/a",
        "http://own.example/",
        "http://given.example/b",
    ]


KINDS = [
    ("<!doctype HTML>a".encode("utf-16"), "image/png", ""),
    ("<html lang=en>".encode("utf-16-le"), "", ""),
    (b"\xef\xbb\xbf \n<!-- c --><div>a</div>", "text/plain", ""),
    (b"<?xml version='1.0'?><html xmlns='x'>", "text/xml", ""),
    (b"<?xml version='1.0'?><feed>", "text/html", "not HTML: XML"),
    (b"Warning: x\n<html><body>", "text/html", ""),
    (b"var a = '<html>';", "application/javascript", "not HTML: plain text"),
    (b"a < b and <i>c</i>", "text/html; charset=utf-8", ""),
    (b"a < b > c", "text/html", "not HTML: plain text"),
    (b"<svg xmlns='x'></svg>", "", "not HTML: XML"),
    (b'["<p>"]', "", "not HTML: JSON"),
    (b"\0" * 100, "text/html", "not HTML: binary"),
    (b"RIFF\0\0\0\0WEBPVP8", "", "not HTML: image"),
]


@pytest.mark.parametrize(("data", "declared", "reason"), KINDS)
def test_html_is_told_from_the_bytes(data: bytes, declared: str, reason: str) -> None:
    assert not_html(data, declared) == reason


@pytest.mark.parametrize(
    "unit", [b"<link ", b"<link rel=", b"<meta content='", b"<", b"<!--", b"href = ", b"\0<"]
)
def test_hostile_heads_take_no_time(unit: bytes) -> None:
    head = (b"canonical og:url" + unit * (LIMIT // len(unit)))[:LIMIT]
    assert page_url(head) == ""
    assert isinstance(not_html(head), str)
