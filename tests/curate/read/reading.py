"""What the tests of readers share: reading everything of a source, compressing, WARC records."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from moebius.curate.document import Document, Unread
from moebius.curate.read import Reader

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def shared(path: str) -> Path:
    """A file or folder of the shared texts; skips the test where they are not there."""
    if not (SHARED / path).exists():
        pytest.skip("the shared texts are not beside this checkout")
    return SHARED / path


def read_all(reader: Reader, task_bytes: int = 1 << 20) -> tuple[list[Document], list[Unread]]:
    """Everything a source gives; keys are unique, and reading again gives the same."""
    tasks, passed = reader.tasks(task_bytes)
    items = [item for task in tasks for item in reader.read(task)]
    documents = [item for item in items if isinstance(item, Document)]
    unread = [*passed, *(item for item in items if isinstance(item, Unread))]
    assert len({document.key for document in documents}) == len(documents)
    assert all(document.source == reader.name for document in documents)
    for document in documents:
        # Whatever is no Unicode could not be written.
        assert document.key.encode() and f"{document.text}{document.url}".encode() is not None
    return documents, unread


def reasons(unread: list[Unread]) -> dict[str, int]:
    return dict(Counter(item.reason for item in unread))


def packed(data: bytes, ending: str) -> bytes:
    """The data as a file of this ending holds it."""
    if ending.endswith(".gz"):
        return gzip.compress(data, 1, mtime=0)
    if ending.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard", reason="needs the curate extra")
        return zstandard.ZstdCompressor().compress(data)
    return data


def record(
    content: bytes, type_: str | None = "response", url: str = "http://a.example/", **changes: str
) -> bytes:
    """A WARC record; `changes` set headers by name with `_` for `-`, an empty one removes it."""
    headers = {
        "WARC-Type": type_ or "",
        "WARC-Target-URI": url,
        "WARC-Date": "2024-05-06T07:08:09Z",
    }
    headers |= {"Content-Length": str(len(content))}
    headers |= {name.replace("_", "-"): value for name, value in changes.items()}
    lines = [f"{name}: {value}\r\n" for name, value in headers.items() if value]
    return b"WARC/1.0\r\n" + "".join(lines).encode() + b"\r\n" + content + b"\r\n\r\n"


def page(text: str) -> bytes:
    return f"<!DOCTYPE html><html><body><p>{text}</p></body></html>".encode()


def http(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = "".join(f"{header}\r\n" for header in headers)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


MEASURE = """
import json, sys
import pyarrow.parquet, torch, zstandard
from moebius.bench.memory import Memory
from moebius.config import from_json
from moebius.curate.document import Document
from moebius.curate.read import LIMIT, Reader
memory = Memory(torch.device("cpu"))
found = []
for config in json.loads(sys.argv[1]):
    reader = from_json(Reader, config)
    items = [item for task in reader.tasks(1 << 20)[0] for item in reader.read(task)]
    reasons = ["" if isinstance(item, Document) else item.reason for item in items]
    found.append([memory.peak() / LIMIT, sorted(set(reasons))])
    del items
print(json.dumps(found))
"""


def measured(sources: list[dict[str, str]]) -> list[tuple[float, list[str]]]:
    """Reads sources in a fresh process, one after the other; after each by how many times LIMIT
    the process has grown since its start, and the reasons met ("": a document)."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(sources)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
