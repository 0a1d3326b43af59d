"""Loading: nothing is used before every byte of it is verified, and damage is said aloud."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from moebius.checkpoint.files import hash_file
from moebius.checkpoint.manifest import (
    MANIFEST,
    STATE,
    CheckpointError,
    Entry,
    digest_tensors,
    parse,
    step_folders,
    step_of,
)
from moebius.checkpoint.stored import stored_tensors
from moebius.checkpoint.tensors import describe_file
from moebius.parallel.world import ALONE, World


def verify(
    path: Path, only: Collection[str] | None = None, share: tuple[int, int] = (0, 1)
) -> None:
    """Check every file of a checkpoint; a CheckpointError names the one that is damaged.

    The bytes of `only` these are read, where others have been; of `(i, n)`, a share, those of every
    n-th file from the i-th on, where others read the rest.
    """
    try:
        manifest = parse((path / MANIFEST).read_bytes())
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read ({error.strerror})") from error
    if step_of(path) not in (None, manifest.step):
        raise CheckpointError(f"{path}: {MANIFEST} is of step {manifest.step}")
    first, parts = share
    for name in [name for name in manifest.files if only is None or name in only][first::parts]:
        verify_file(path, name, manifest.files[name])
    described: list[tuple[str, str, list[int]]] = []
    for name in manifest.files:
        if name == STATE:
            continue
        try:
            described += describe_file(path / name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error})") from error
    if digest_tensors(described) != manifest.tensors:
        raise CheckpointError(f"{path}: the tensors are not those that {MANIFEST} names")


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the state of a checkpoint, once it is verified.

    The tensors may be changed freely; the files do not change with them.
    """
    verify(path)
    stored, state = stored_tensors(path)
    return {name: x.whole() for name, x in stored.items()}, state


def complete(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; their bytes are not looked at."""
    return [path for path in step_folders(folder).values() if (path / MANIFEST).is_file()]


def latest_intact(
    folder: Path,
    *,
    say: Callable[[str], None],
    only: Collection[str] | None = None,
    world: World = ALONE,
) -> Path | None:
    """The newest checkpoint that passes verification, of `only` these files; None if there is none.

    Each damaged one is reported by a line to `say`; if all are, a CheckpointError lists them.
    The ranks of a world look together, each at its share: at what the main one sees in the folder,
    which on a network others may not see yet. Collective.
    """
    seen = [path.name for path in step_folders(folder).values()]
    damaged: list[str] = []
    for name in reversed(json.loads(world.told(json.dumps(seen)))):
        path = folder / name
        wrong = world.heard(_wrong_with(path, only, (world.rank, world.size)))
        if not wrong:
            return path
        damaged.append(wrong)
        say(f"damaged checkpoint passed over: {wrong}")
    if damaged:
        raise CheckpointError(
            f"no intact checkpoint in {folder}: {'; '.join(damaged)}; restore one or start anew"
        )
    return None


def _wrong_with(path: Path, only: Collection[str] | None, share: tuple[int, int]) -> str:
    """What `verify` says of a checkpoint; nothing where it is intact."""
    try:
        verify(path, only, share)
    except CheckpointError as error:
        return str(error)
    return ""


def verify_file(path: Path, name: str, entry: Entry) -> None:
    """Check one file of a checkpoint against what is known of it; raises as `verify`."""
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
