"""Datasets of the Hugging Face hub, or of a local folder, streamed (the `data` extra).

One task a shard of the dataset, rows in the dataset's own order, from its `train` part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebius.curate.document import Document, Unread
from moebius.curate.read import Reader, Task
from moebius.curate.read.row import Fields
from moebius.data.documents import HUB
from moebius.data.hub import open_rows

UNREACHABLE = "damaged or unreachable dataset"


@dataclass(frozen=True)
class Hub(Reader):
    """Rows of `hf:OWNER/NAME` or of a folder, with fields as `Rows` has them."""

    subset: str = ""
    fields: Fields = Fields()

    @property
    def place(self) -> str:
        """What the library calls the dataset. Raises ValueError where it cannot be one."""
        name = self.path.removeprefix(HUB)
        folder = Path(name).expanduser()
        if name and folder.is_dir():
            return str(folder.resolve())
        if name.count("/") != 1 or not all(name.split("/")) or name.startswith((".", "~")):
            raise ValueError(f"{self.path!r} is neither hf:OWNER/NAME nor a folder that exists")
        return name

    def tasks(self, task_bytes: int) -> tuple[list[Task], list[Unread]]:
        place = self.place
        rows, needed = open_rows(place, self.subset), self.fields.needed
        columns = rows.column_names
        if columns and not set(columns) & set(needed):
            raise ValueError(
                f"{self.path!r} has no field {' or '.join(needed)}, only {', '.join(columns)}"
            )
        folder = Path(place)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        shards = _num_shards(rows)
        names = [f"{index:05d}-of-{shards:05d}" for index in range(shards)]
        return [Task((name,), size // shards) for name in names], []

    def read(self, task: Task) -> Iterator[Document | Unread]:
        fields = self.fields
        for name in task.files:
            index, _, shards = name.partition("-of-")
            rows = open_rows(self.place, self.subset)
            if rows.column_names:
                kept = [column for column in rows.column_names if column in fields.names]
                rows = rows.select_columns(kept)
            if int(shards) > 1:
                rows = rows.shard(int(shards), int(index))
            number = -1
            try:
                for number, row in enumerate(rows):
                    yield fields.document(f"{name}#{number}", row, 0, self.name, self.kind)
            # The library has a loader for each format, and each its own exceptions.
            except Exception:
                yield Unread(f"{name}#{number + 1}", UNREACHABLE)


def _num_shards(rows: Any) -> int:
    """The parts a streamed dataset has of its own; a dataset saved to disk is read in one go."""
    import datasets

    return max(1, rows.num_shards) if isinstance(rows, datasets.IterableDataset) else 1
