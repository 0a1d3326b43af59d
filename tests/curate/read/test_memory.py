"""Inputs made to exhaust a machine: counted by reason, in memory of a few times the limit."""

import gzip
import zlib
from pathlib import Path

import pytest

from .reading import http, measured, page, record

ZEROS, MIB = bytes(1 << 20), 1 << 20


def zeros(size: int, before: bytes = b"") -> bytes:
    """A gzip member that decompresses to so many MiB of zeros."""
    packer = zlib.compressobj(1, wbits=31)
    return b"".join(
        [packer.compress(before), *(packer.compress(ZEROS) for _ in range(size)), packer.flush()]
    )


def hostile(folder: Path) -> dict[str, tuple[str, bytes, list[str]]]:
    """File name -> reader, content, the reasons it must give ("": a document)."""
    zstandard = pytest.importorskip("zstandard", reason="needs the curate extra")
    packer = zstandard.ZstdCompressor().compressobj()
    frame = b"".join([*(packer.compress(ZEROS) for _ in range(800)), packer.flush()])
    bomb, many = zeros(500), "decompresses to more than the limit"
    head = record(http(page("a")), Content_Length="99999999999").rstrip(b"\r\n")
    last = gzip.compress(record(http(page("b"))))
    return {
        "a.html.gz": ("pages", bomb, [many]),
        "b.html.zst": ("pages", frame, [many]),
        "c.txt.gz": ("texts", bomb, [many]),
        "e.jsonl.gz": ("rows", bomb, [many]),
        "f.jsonl.zst": ("rows", frame, [many]),
        "g.warc.gz": ("warc", zeros(80, head) + last, ["", many]),
        "h.warc.gz": ("warc", gzip.compress(record(http(bomb))) + last, ["", many]),
    }


def test_bombs_and_lines_without_end(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs the curate extra")
    sources, expected = [], []
    for name, (use, data, found) in hostile(tmp_path).items():
        (tmp_path / name).write_bytes(data)
        sources.append({"use": use, "path": str(tmp_path / name)})
        expected.append(found)
    # 160 MiB of one line, which takes no room on a disk.
    for name, use, found in (
        ("j.html", "pages", ["document above 16 MiB"]),
        ("k.jsonl", "rows", ["line above 32 MiB"]),
        ("n.warc", "warc", ["document above 16 MiB"]),
    ):
        with (tmp_path / name).open("wb") as stream:
            stream.write(record(http(page("a"))).rstrip() if name == "n.warc" else b"")
            stream.truncate(160 * MIB)
        sources.append({"use": use, "path": str(tmp_path / name)})
        expected.append(found)
    results = measured(sources)
    assert [reasons for _, reasons in results] == expected
    # Twice the limit is read of a line before it is given up; the rest is copies on the way.
    assert max(grown for grown, _ in results) < 8, list(zip(sources, results, strict=True))
