"""Loading: nothing is used before every byte of it is verified, and damage is said aloud."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from moebius.checkpoint.files import hash_file
from moebius.checkpoint.manifest import (
    MANIFEST,
    STATE,
    CheckpointError,
    Entry,
    Manifest,
    digest_tensors,
    parse,
    step_folders,
    step_of,
)
from moebius.checkpoint.tensors import describe_file


def verify(path: Path) -> None:
    """Check every file of a checkpoint; a CheckpointError names the one that is damaged."""
    _verified(path)


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the state of a checkpoint, once it is verified.

    The tensors may be changed freely; the files do not change with them.
    """
    manifest = _verified(path)
    tensors: dict[str, torch.Tensor] = {}
    for name in _tensor_files(manifest):
        tensors |= load_file(path / name)
    return tensors, json.loads((path / STATE).read_bytes())


def complete(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; their bytes are not looked at."""
    return [path for path in step_folders(folder).values() if (path / MANIFEST).is_file()]


def latest_intact(folder: Path, *, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that passes verification; None if there is none at all.

    Each damaged one is reported by a line to `say`; if all are, a CheckpointError lists them.
    """
    damaged: list[str] = []
    for path in reversed(step_folders(folder).values()):
        try:
            verify(path)
        except CheckpointError as error:
            damaged.append(str(error))
            say(f"damaged checkpoint passed over: {error}")
        else:
            return path
    if damaged:
        raise CheckpointError(
            f"no intact checkpoint in {folder}: {'; '.join(damaged)}; restore one or start anew"
        )
    return None


def _verified(path: Path) -> Manifest:
    try:
        manifest = parse((path / MANIFEST).read_bytes())
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read ({error.strerror})") from error
    if step_of(path) not in (None, manifest.step):
        raise CheckpointError(f"{path}: {MANIFEST} is of step {manifest.step}")
    for name, entry in manifest.files.items():
        _verify_file(path, name, entry)
    described: list[tuple[str, str, list[int]]] = []
    for name in _tensor_files(manifest):
        try:
            described += describe_file(path / name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error})") from error
    if digest_tensors(described) != manifest.tensors:
        raise CheckpointError(f"{path}: the tensors are not those that {MANIFEST} names")
    return manifest


def _verify_file(path: Path, name: str, entry: Entry) -> None:
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"{path}: {name} is missing")
    try:
        size, digest = file.stat().st_size, hash_file(file)
    except OSError as error:
        raise CheckpointError(f"{path}: {name} cannot be read ({error.strerror})") from error
    if size != entry.bytes:
        raise CheckpointError(f"{path}: {name} has {size:,} bytes instead of {entry.bytes:,}")
    if digest != entry.sha256:
        raise CheckpointError(f"{path}: {name} is damaged (its sha256 differs)")


def _tensor_files(manifest: Manifest) -> list[str]:
    return [name for name in manifest.files if name != STATE]
