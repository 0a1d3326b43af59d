"""Saving: a checkpoint stands aside until it is whole, and takes its name by one rename.

Killed at any moment, the folder holds what it held before, or the new checkpoint as well. A full
disk leaves the earlier checkpoints as they are.
"""

import errno
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from moebius.checkpoint.files import forget_cached, sync_folder, write_file
from moebius.checkpoint.load import verify
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
from moebius.checkpoint.tensors import Lazy, TensorFile, plan_files

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
    if keep < 1 or step < 0:
        raise ValueError(f"keep must be at least 1 and step at least 0, not {keep} and {step}")
    state_bytes = (json.dumps(_plain(state, "state"), indent=1) + "\n").encode()
    files = plan_files(tensors)
    needed = len(state_bytes) + sum(file.num_bytes() for file in files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        _clean(folder)
        path = _write(folder, step, files, state_bytes)
        _remove_old(folder, step, keep)
    except OSError as error:
        raise CheckpointError(_explain(folder, step, needed, error)) from error
    return path


def follow(tensors: Mapping[str, torch.Tensor | Lazy]) -> None:
    """Take part in a `save` of another process: make each lazy tensor when it is due there."""
    for file in plan_files(tensors):
        for lazy in file.tensors.values():
            lazy.make()


def _write(folder: Path, step: int, files: list[TensorFile], state: bytes) -> Path:
    aside = folder / f".writing-{folder_name(step)}"
    try:
        aside.mkdir()
        entries = {STATE: Entry(*write_file(aside / STATE, [state]))}
        for file in files:
            entries[file.name] = Entry(*write_file(aside / file.name, file.chunks()))
        described = [tensor for file in files for tensor in file.describe()]
        manifest = Manifest(step, entries, digest_tensors(described))
        write_file(aside / MANIFEST, [manifest.to_bytes()])
        sync_folder(aside)
        for name in entries:
            forget_cached(aside / name)
        verify(aside)
        return _take_name(folder, step, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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


def _explain(folder: Path, step: int, needed: int, error: OSError) -> str:
    remedy = _REMEDIES.get(error.errno or 0, "make sure the folder can be written")
    reason = error.strerror or str(error)
    free = f", {shutil.disk_usage(folder).free:,} are free" if folder.is_dir() else ""
    return (
        f"cannot save step {step} in {folder}: {reason} ({needed:,} bytes needed{free}); "
        f"earlier checkpoints are intact; {remedy}, then go on with --resume"
    )
