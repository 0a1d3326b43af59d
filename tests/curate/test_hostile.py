"""Hostile input through the whole pipeline: counted by reason, memory bounded, the run goes on."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moebius.curate.shards import read_documents

pytest.importorskip("pyarrow", reason="the curate extra is not installed")
pytest.importorskip("trafilatura", reason="the curate extra is not installed")

NUMBERS = ("one", "two", "six", "ten", "many", "few")
SENTENCES = [
    f"<p>A good page says something in {a} words or {b}, and {c} of them matter to readers.</p>"
    for a in NUMBERS
    for b in NUMBERS
    for c in NUMBERS[:1]
]
GOOD = "<html><body><article>" + "".join(SENTENCES)
LARGE = 500 << 20
# Of the process that runs the curation, above what its imports take.
MOST_MEMORY = 256 << 20

CODE = """
import json, sys
from pathlib import Path
import torch
from moebius.bench.memory import Memory
from moebius.config import from_json
from moebius.curate.config import Curation
from moebius.curate.pipeline import curate
memory = Memory(torch.device("cpu"))
curate(from_json(Curation, json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
print(memory.peak())
"""


def zeros(path: Path, size: int, wrap: tuple[bytes, bytes] = (b"", b"")) -> None:
    """A gzip file of one line of `size` letters."""
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(wrap[0])
        for _ in range(size >> 20):
            stream.write(b"a" * (1 << 20))
        stream.write(wrap[1])


def warc(path: Path) -> None:
    """Five records: honest, no length, a lying length, no headers at all, honest."""

    def record(uri: str, body: bytes, length: int | None) -> bytes:
        head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {uri}\r\n"
        head += "" if length is None else f"Content-Length: {length}\r\n"
        return head.encode() + b"\r\n" + body + b"\r\n\r\n"

    page = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n" + GOOD.encode()
    rows = [
        record("https://a.example/0", page, len(page)),
        record("https://a.example/1", page, None),
        record("https://a.example/2", page, 7 * len(page)),
        b"WARC/1.0\r\n\r\n" + page + b"\r\n\r\n",
        record("https://a.example/4", page, len(page)),
    ]
    path.write_bytes(b"".join(rows))


def hostile(home: Path, size: int) -> Path:
    """The inputs, and the recipe over them."""
    from pyarrow import Table, parquet

    for name in ("pages", "warc", "rows"):
        (home / name).mkdir(parents=True)
    pages = home / "pages"
    (pages / "good.html").write_text(GOOD)
    zeros(pages / "line.html.gz", size, (GOOD.encode(), b"</body></html>"))
    (pages / "deep.html").write_text("<div>" * 200_000 + "deep down there" + "</div>" * 200_000)
    (pages / "latin.html").write_bytes(GOOD.encode() + b"<p>caf\xe9 \xff\xfe\x81</p>")
    (pages / "nul.html").write_bytes(GOOD.encode().replace(b"says", b"sa\x00ys"))
    (pages / "empty.html").touch()
    (pages / "cut.html.gz").write_bytes(gzip.compress(GOOD.encode() * 50)[:90])
    (pages / "noise.html").write_bytes(bytes(range(256)) * 200)
    warc(home / "warc" / "odd.warc")
    parquet.write_table(Table.from_pydict({"other": ["x"]}), home / "rows" / "a.parquet")
    good = Table.from_pydict({"text": ["a row of words that is read", "and one more of them"]})
    parquet.write_table(good, home / "rows" / "b.parquet")
    (home / "rows" / "c.jsonl").write_bytes(b'{"text": "fine words"}\n{"text": 3}\n{"te\n\xff\n')
    recipe = {
        "name": "hostile",
        "sources": [
            {"use": "pages", "path": str(pages), "name": "pages"},
            {"use": "warc", "path": str(home / "warc"), "name": "warc"},
            {"use": "rows", "path": str(home / "rows"), "name": "rows", "kind": "prose"},
        ],
        "steps": [
            {"use": "extract", "seconds": 10.0},
            "repair",
            "exact_dedup",
        ],
        "engine": "local",
    }
    (home / "recipe.json").write_text(json.dumps(recipe))
    return home / "recipe.json"


def run(home: Path, size: int) -> tuple[int, Any, Path]:
    """The memory a run took above its imports, its counts, and its folder."""
    recipe = hostile(home, size)
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(recipe), str(home / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout), json.loads((home / "out" / "counts.json").read_text()), home / "out"


def check(counts: Any, out: Path) -> None:
    unread = {
        name: {k: n for k, (n, _) in counts["unread"][name].items()} for name in counts["unread"]
    }
    pages = unread["pages"]
    # Eight files and each is a document or has its reason.
    read = counts["sources"]["pages"]["documents"]
    assert read + sum(pages.values()) == 8
    assert any("limit" in reason or "MiB" in reason for reason in pages), pages
    assert any("damaged" in reason for reason in pages), pages
    assert any("empty" in reason for reason in pages), pages
    # No page of the WARC is lost, whatever its headers say.
    rows = counts["sources"]["warc"]["documents"] + sum(unread["warc"].values())
    assert counts["sources"]["warc"]["documents"] == rows == 5, unread["warc"]
    assert counts["sources"]["rows"]["documents"] == 3
    assert sum(unread["rows"].values()) == 4, unread["rows"]
    kept = [d for path in (out / "documents").glob("*") for d in read_documents(path)]
    texts = {document.key: document.text for document in kept}
    assert "says something" in texts["good.html"]
    assert not any("\x00" in text for text in texts.values())


def test_everything_is_counted(tmp_path: Path) -> None:
    _, counts, out = run(tmp_path, 20 << 20)
    check(counts, out)


@pytest.mark.slow
def test_half_a_gigabyte_in_a_line_needs_no_more_memory(tmp_path: Path) -> None:
    memory, counts, out = run(tmp_path, LARGE)
    check(counts, out)
    assert memory < MOST_MEMORY
