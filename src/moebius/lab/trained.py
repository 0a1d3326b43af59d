"""Runs of an experiment, each in a folder of its own: trained once, gone on with, never repeated.

What a folder holds is known by what identifies its run; a user's own files count by their bytes.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from moebius.checkpoint import complete
from moebius.checkpoint.files import hash_file
from moebius.checkpoint.manifest import step_of
from moebius.config import differences, identity, map_user_files
from moebius.data.prepared import Prepared
from moebius.model.lm import LM
from moebius.train.fit import continue_run, fit
from moebius.train.folder import RunFolder
from moebius.train.run import Run
from moebius.train.session import Progress, read_run


def identity_of(run: Run) -> Any:
    """What identifies a run; a user's own files by their bytes, wherever they lie."""
    return map_user_files(identity(run), lambda file: hash_file(Path(file)))


def check_unbegun(run: Run, folder: Path) -> bool:
    """Whether a run is yet to begin in a folder; ValueError where another one lies there."""
    if not (folder / "run.json").is_file():
        return True
    old, _ = read_run(RunFolder.open(folder))
    changed = differences(identity_of(old), identity_of(run))
    if changed:
        raise ValueError(
            f"{folder} holds another experiment ({'; '.join(changed[:3])}); choose another folder"
        )
    return False


def train_in(run: Run, folder: Path, progress: Progress | None) -> None:
    """Train a run up to its last step, from the start or from where it was stopped."""
    if check_unbegun(run, folder):
        shutil.rmtree(folder, ignore_errors=True)  # what a kill left before there was a run
        fit(run, folder, progress)
    elif not _is_done(run, folder):
        stop = "none" if run.stop_at is None else str(run.stop_at)
        continue_run(folder, [f"stop_at={stop}"], progress)


def _is_done(run: Run, folder: Path) -> bool:
    if run.last_step == run.steps:
        return (folder / "summary.json").is_file()
    newest = [step_of(path) for path in complete(folder / "checkpoints")[-1:]]
    return newest == [run.last_step]


# An evaluation for runs of which only the training loss matters.
UNJUDGED = "moebius.lab.trained:unjudged"


def unjudged(
    model: LM,
    prepared: Prepared,
    *,
    sequence_length: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    write: Callable[[str, Mapping[str, Any]], object],
) -> dict[str, Any]:
    """No figures."""
    return {}
