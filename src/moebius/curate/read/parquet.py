"""The rows of a parquet file, few at a time, with what cannot be read named in their place.

Only the columns looked for are read. A group of rows that is damaged costs that group; one whose
rows are above the limit on average, or that swells like a bomb, is not decoded at all.
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from moebius.curate.read import LIMIT
from moebius.curate.read.row import Fields
from moebius.curate.read.streams import BLOCK, FREE, NEEDS_EXTRA, RATIO, TOO_LARGE, TOO_MUCH

DAMAGED = "damaged parquet file"
DAMAGED_GROUP = "damaged row group"
WITHOUT = "parquet file without the column"
BATCH = 16
# Row groups above this are decoded row by row: repeated values are small until they are decoded.
SMALL = 2 * LIMIT
# A file may claim any number of rows; so many are counted one by one.
NAMED = 10_000


def import_parquet(what: str) -> tuple[ModuleType, ModuleType]:
    """The optional packages. Raises ValueError where they are not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{what} {NEEDS_EXTRA}") from error
    return pyarrow, parquet


def parquet_rows(
    path: Path, fields: Fields
) -> Iterator[tuple[int | None, dict[str, object] | str]]:
    """Each row with its number; where there is none to be had the reason, without a number where
    it is that of the file or of a group of rows."""
    pyarrow, parquet = import_parquet(path.name)
    damage = (pyarrow.ArrowException, OSError, ValueError, MemoryError)
    with path.open("rb") as stream:
        try:
            table = parquet.ParquetFile(stream, buffer_size=BLOCK, pre_buffer=False)
            names = set(table.schema_arrow.names)
        except damage:
            yield None, DAMAGED
            return
        first = next((name for name in fields.needed if name in names), None)
        if first is None:
            yield None, WITHOUT
            return
        columns = [first, *(name for name in fields.names if name in names - {*fields.needed})]
        start = 0
        for group in range(table.metadata.num_row_groups):
            about = table.metadata.row_group(group)
            swollen, batch = _size(about, columns)
            if swollen:
                yield from ((start + i, swollen) for i in range(min(about.num_rows, NAMED)))
            else:
                try:
                    parts = table.iter_batches(batch, row_groups=[group], columns=columns)
                    yield from _group(parts, start)
                except damage:
                    yield None, DAMAGED_GROUP
            start += about.num_rows


def _size(about: Any, columns: list[str]) -> tuple[str, int]:
    """Why a group of rows is not to be decoded, if so; else how many rows at a time."""
    packed = unpacked = 0
    for index in range(about.num_columns):
        column = about.column(index)
        if column.path_in_schema.split(".")[0] in columns:
            packed += max(0, column.total_compressed_size)
            unpacked += max(0, column.total_uncompressed_size)
    if unpacked > LIMIT * max(1, about.num_rows):
        return TOO_LARGE, 0
    if unpacked > FREE + RATIO * packed:
        return TOO_MUCH, 0
    return "", BATCH if unpacked <= SMALL else 1


def _group(parts: Any, start: int) -> Iterator[tuple[int, dict[str, object] | str]]:
    number = start
    for part in parts:
        cells = list(zip(part.schema.names, part.columns, strict=True))
        for index in range(part.num_rows):
            try:
                yield number, {name: column[index].as_py() for name, column in cells}
            except UnicodeDecodeError:
                yield number, "invalid UTF-8"
            number += 1
