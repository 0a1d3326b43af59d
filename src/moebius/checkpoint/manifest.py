"""The manifest of a checkpoint: what a whole one consists of, and how its folders are named.

`manifest.json` names every other file with its size and sha256, digests the tensors' names, dtypes
and shapes, and carries a digest of itself; its text is canonical, so that no byte of it is free.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"

_NAME = re.compile(r"(?P<replaced>\.replaced-)?step-(?P<step>\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint could not be saved, or is damaged; one line that says what to do."""


@final
@dataclass(frozen=True)
class Entry:
    """One file of a checkpoint."""

    bytes: int
    sha256: str


@final
@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says."""

    step: int
    files: Mapping[str, Entry]
    tensors: str

    def to_bytes(self) -> bytes:
        """The one text of this manifest."""
        body = {
            "format": FORMAT,
            "step": self.step,
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            "tensors": self.tensors,
        }
        own = hashlib.sha256(_canonical(body)).hexdigest()
        return _canonical({**body, "self": own})


def _canonical(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, sort_keys=True, indent=1) + "\n").encode()


def parse(data: bytes) -> Manifest:
    """Read a manifest; a CheckpointError if it is not, to the byte, what was written."""
    try:
        found = json.loads(data)
        version = found["format"]
        files = {name: Entry(**entry) for name, entry in found["files"].items()}
        manifest = Manifest(found["step"], files, found["tensors"])
        intact = manifest.to_bytes() == data
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{MANIFEST} is damaged") from None
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{MANIFEST} is damaged or of the newer format {version} (this moebius reads {FORMAT})"
        )
    if not intact:
        raise CheckpointError(f"{MANIFEST} is damaged")
    return manifest


def digest_tensors(described: Iterable[tuple[str, str, list[int]]]) -> str:
    """A digest of the (name, dtype, shape) of all tensors, in any order."""
    return hashlib.sha256(json.dumps(sorted(described)).encode()).hexdigest()


def folder_name(step: int) -> str:
    """The name of a step's folder; it sorts by step."""
    return f"step-{step:08d}"


def replaced_name(step: int) -> str:
    """Where a step's old checkpoint waits while a new one takes its name."""
    return f".replaced-{folder_name(step)}"


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint's folder."""
    match = _NAME.fullmatch(path.name)
    return int(match["step"]) if match else None


def step_folders(folder: Path) -> dict[int, Path]:
    """All checkpoint folders by step, ascending, damaged ones too.

    A kill between the two renames that replace a step leaves only its old folder, under
    another name; it stands in for the step then.
    """
    if not folder.is_dir():
        return {}
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):  # ".replaced-" sorts before "step-", which wins
        step = step_of(path)
        if step is not None and path.is_dir():
            found[step] = path
    return dict(sorted(found.items()))
