"""Saving: a checkpoint stands aside until it is whole, and takes its name by one rename.

Killed at any moment, the folder holds what it held before, or the new checkpoint as well. A full
disk leaves the earlier checkpoints as they are.
"""

import contextlib
import errno
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

import torch

from moebius.checkpoint.files import forget_cached, sync_folder, write_file
from moebius.checkpoint.load import verify, verify_file
from moebius.checkpoint.manifest import (
    MANIFEST,
    STATE,
    CheckpointError,
    Entry,
    Manifest,
    digest_tensors,
    folder_name,
    replaced_name,
    step_folders,
)
from moebius.checkpoint.tensors import Lazy, TensorFile, place_of, plan_files

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

_REMEDIES = {
    errno.ENOSPC: "free some space or lower the number of checkpoints kept",
    errno.EDQUOT: "free some of your quota or lower the number of checkpoints kept",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
}


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor | Lazy],
    state: Mapping[str, JSON],
    *,
    keep: int,
) -> Path:
    """Save a checkpoint as `folder/step-XXXXXXXX` and keep the last `keep` up to this step.

    Tensors are written one at a time; a lazy one is made when its turn comes.
    Tuples in `state` come back as lists. Raises CheckpointError when the disk is full or the
    folder cannot be written, the earlier checkpoints being intact, and when `state` or a tensor
    cannot be stored exactly.
    """
    whole = Whole(folder, step, state, keep)
    files = plan_files(tensors)
    for name in tensors:
        if place_of(name)[0] != name:
            raise CheckpointError(f"no tensor can be named {name!r}: fragments of one are")
    with whole.explained(sum(file.num_bytes() for file in files)):
        whole.begin()
        try:
            return whole.commit([whole.write(file) for file in files])
        finally:
            whole.clear()


@final
@dataclass(frozen=True)
class Written:
    """A file of tensors that is on the disk, and its tensors' names, dtypes and shapes."""

    name: str
    entry: Entry
    described: Sequence[tuple[str, str, list[int]]]


@final
class Whole:
    """A checkpoint that is not there yet: begun aside, its files written, then committed.

    One process begins and commits; any may write files in between.
    """

    def __init__(self, folder: Path, step: int, state: Mapping[str, JSON], keep: int) -> None:
        if keep < 1 or step < 0:
            raise ValueError(f"keep must be at least 1 and step at least 0, not {keep} and {step}")
        self.folder, self.step, self.keep = folder, step, keep
        self._aside = folder / f".writing-{folder_name(step)}"
        self._state = (json.dumps(_plain(state, "state"), indent=1) + "\n").encode()

    @contextlib.contextmanager
    def explained(self, num_bytes: int, by: str = "") -> Iterator[None]:
        """An OSError inside becomes a CheckpointError; `num_bytes` are those of tensors, `by` says
        whose."""
        try:
            yield
        except OSError as error:
            needed = len(self._state) + num_bytes
            text = _explain(self.folder, self.step, f"{needed:,} bytes needed {by}".strip(), error)
            raise CheckpointError(text) from error

    def begin(self) -> None:
        """Make the folder aside, once what a killed process left is put right."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder.parent)
        _clean(self.folder)
        self._aside.mkdir()

    def write(self, file: TensorFile) -> Written:
        """Write a file, and read it again from the disk; CheckpointError if it is another then."""
        path = self._aside / file.name
        entry = Entry(*write_file(path, file.chunks()))
        forget_cached(path)
        verify_file(self._aside, file.name, entry)
        return Written(file.name, entry, file.describe())

    def commit(self, files: Iterable[Written]) -> Path:
        """Give it its name, with these files of tensors; old ones go."""
        entries = {STATE: Entry(*write_file(self._aside / STATE, [self._state]))}
        files = list(files)
        entries |= {file.name: file.entry for file in files}
        described = [tensor for file in files for tensor in file.described]
        manifest = Manifest(self.step, entries, digest_tensors(described))
        write_file(self._aside / MANIFEST, [manifest.to_bytes()])
        sync_folder(self._aside)
        forget_cached(self._aside / STATE)
        verify(self._aside, only=[STATE])
        path = _take_name(self.folder, self.step, self._aside)
        _remove_old(self.folder, self.step, self.keep)
        return path

    def clear(self) -> None:
        """Remove what lies aside."""
        shutil.rmtree(self._aside, ignore_errors=True)


def _take_name(folder: Path, step: int, aside: Path) -> Path:
    path, replaced = folder / folder_name(step), folder / replaced_name(step)
    if path.exists():
        path.rename(replaced)
    aside.rename(path)
    sync_folder(folder)
    _remove(replaced)
    return path


def _clean(folder: Path) -> None:
    """Put back or remove what a killed process left."""
    for step, path in step_folders(folder).items():
        if path.name == replaced_name(step):
            path.rename(folder / folder_name(step))
    for path in folder.iterdir():
        if path.name.startswith((".writing-", ".removing-", ".replaced-")):
            _remove(path)


def _remove_old(folder: Path, step: int, keep: int) -> None:
    """Keep the last up to this step; later ones stay until the run, gone back, replaces them."""
    old = [path for found, path in step_folders(folder).items() if found <= step]
    for path in old[:-keep]:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder; renamed first, so that a half-removed one never looks like a checkpoint."""
    if not path.exists():
        return
    if not path.name.startswith("."):
        path = path.rename(path.with_name(f".removing-{path.name}"))
        sync_folder(path.parent)
    shutil.rmtree(path, ignore_errors=True)  # what is left goes at the next save


def _plain(value: Any, where: str) -> Any:
    """The same data in JSON's own types; a CheckpointError names what JSON would change."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(f"{where} is {value}, which JSON cannot hold; store its hex()")
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}; JSON needs texts as keys")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise CheckpointError(f"{where} is a {type(value).__name__}; store it as a tensor or as text")


def _explain(folder: Path, step: int, needed: str, error: OSError) -> str:
    remedy = _REMEDIES.get(error.errno or 0, "make sure the folder can be written")
    reason = error.strerror or str(error)
    free = f", {shutil.disk_usage(folder).free:,} are free" if folder.is_dir() else ""
    return (
        f"cannot save step {step} in {folder}: {reason} ({needed}{free}); "
        f"earlier checkpoints are intact; {remedy}, then go on with --resume"
    )
