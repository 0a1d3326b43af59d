"""Documents on disk: parquet with zstd, streamed both ways, equal bytes for equal documents.

Rows are written in groups of about `GROUP_BYTES`, so that neither side holds more than a group.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from moebius.curate.document import Document, Dropped

GROUP_BYTES = 4 << 20
TEXTS = ("key", "text", "source", "kind", "url", "date", "language")
AS_JSON = ("scores", "labels", "lineage")
NEEDS_EXTRA = "curation needs the curate extra: pip install 'moebius[curate]'"


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(NEEDS_EXTRA) from error
    return pyarrow, parquet


def row_of(document: Document) -> dict[str, Any]:
    """The columns of a document."""
    row: dict[str, Any] = {name: getattr(document, name) for name in TEXTS}
    row["scores"] = json.dumps(dict(document.scores), sort_keys=True)
    row["labels"] = json.dumps(dict(document.labels), sort_keys=True, ensure_ascii=False)
    row["lineage"] = json.dumps(list(document.lineage))
    row["raw"] = document.raw
    return row


def document_of(row: dict[str, Any]) -> Document:
    """The document of its columns."""
    values = {name: row[name] for name in (*TEXTS, "raw")}
    values |= {"scores": json.loads(row["scores"]), "labels": json.loads(row["labels"])}
    return Document(**values, lineage=tuple(json.loads(row["lineage"])))


class Writer:
    """Writes documents to one file, which appears with the first and is whole after `close`."""

    def __init__(self, path: Path, *, why: bool = False) -> None:
        self._path, self._why = path, why
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._file: Any = None
        self._schema: Any = None

    def add(self, document: Document, dropped: Dropped | None = None) -> None:
        """Append a document; to a file of dropped ones with its reason."""
        row = row_of(document)
        if self._why and dropped is not None:
            row |= {"reason": dropped.reason, "detail": dropped.detail}
        self._rows.append(row)
        self._bytes += len(document.text) + len(document.raw) + 256
        if self._bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        pyarrow, parquet = _pyarrow()
        if self._file is None:
            names = [*TEXTS, *AS_JSON, *(["reason", "detail"] if self._why else [])]
            fields = [pyarrow.field(name, pyarrow.string()) for name in names]
            fields.append(pyarrow.field("raw", pyarrow.binary()))
            self._schema = pyarrow.schema(fields)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = parquet.ParquetWriter(self._path, self._schema, compression="zstd")
        self._file.write_table(pyarrow.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._bytes = [], 0

    def close(self) -> None:
        """Finish the file; where no document came there is none."""
        if self._rows:
            self._flush()
        if self._file is not None:
            self._file.close()
            self._file = None


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a file that `Writer` wrote, a row group at a time; none if it is absent."""
    if not path.exists():
        return
    _, parquet = _pyarrow()
    with parquet.ParquetFile(path) as table:
        for group in range(table.num_row_groups):
            for row in table.read_row_group(group).to_pylist():
                yield document_of(row)


def valid_text(document: Document) -> bool:
    """Whether every text of a document can be written as UTF-8."""
    try:
        for text in (document.key, document.text, document.url, document.date, document.language):
            text.encode()
    except UnicodeEncodeError:
        return False
    return True


def without_raw(document: Document) -> Document:
    """The document without the bytes of its page, if it has a text."""
    return dataclasses.replace(document, raw=b"") if document.raw and document.text else document
