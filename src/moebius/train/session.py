"""Setting up a training session: everything checked before anything is written, then everything
built.

A session is a run, its folder, its data and its state, ready for the loop.
"""

import dataclasses
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moebius
from moebius import checkpoint
from moebius.config import fingerprint, resolve
from moebius.data import Loader, Prepared, prepare
from moebius.model.count import Counts, count
from moebius.monitor.ceiling import matmul_rate
from moebius.train.folder import RunFolder
from moebius.train.precision import DTYPES, choose
from moebius.train.run import (
    Run,
    from_folder_json,
    inexact_changes,
    to_folder_json,
)
from moebius.train.state import TrainState, new_state, optimizer_of
from moebius.train.step import forward_backward

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass
class Session:
    """What the loop needs."""

    run: Run
    folder: RunFolder
    prepared: Prepared
    loader: Loader
    state: TrainState
    device: torch.device
    precision: str
    counts: Counts
    # FLOP/s of plain matrix products here, in the dtype of the run.
    ceiling: float
    # What was said while it was resumed.
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return DTYPES[self.precision]

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed exactly."""
        return {"data": self.prepared.digest, "precision": self.precision}

    def save(self) -> Path:
        """Save a checkpoint of this moment."""
        return self.state.save(self.folder.checkpoints, self.run.keep_checkpoints, self.facts())


def check(run: Run) -> Counts:
    """Build everything on the meta device, so that what does not fit is refused at once."""
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch finds no CUDA device here; use device=cpu")
    with torch.device("meta"):
        model = run.model.build(run.vocab)
        optimizer_of(run, model)
    run.optim.schedule.factor(0, run.steps, run.tokens_per_step())
    resolve(run.evaluation)
    for sink in run.sinks:
        sink.check()
    return count(model, run.sequence_length)


def device_of(run: Run) -> torch.device:
    """The device a run computes on."""
    if run.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(run.device)


def open_data(run: Run, progress: Progress | None) -> tuple[Prepared, Loader]:
    """The prepared corpus and its loader; ValueError where it cannot serve the run."""
    prepared = prepare(run.data, run.vocab, progress=progress)
    loader = Loader(prepared, run.sequence_length, run.batch, run.seed, run.batch_ramp)
    loader.check(run.steps)
    return prepared, loader


def start(run: Run, folder: RunFolder, prepared: Prepared, loader: Loader) -> Session:
    """A new session in an empty, locked folder."""
    device = device_of(run)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    state = new_state(run, device)
    precision, measured = choose(run.precision, device, trial(run, state, loader, device))
    session = _session(run, folder, prepared, loader, state, device, precision)
    kept = to_folder_json(run, lambda path: _relative(folder, path))
    prepared.tokenizer.save(folder.path / "tokenizer.json")
    # Last, because with it the folder is a run that can be resumed.
    folder.write_json("run.json", {**describe(session), "run": kept, "precision_trial": measured})
    return session


def _relative(folder: RunFolder, path: Path) -> str:
    return str(Path(folder.keep_user_file(path)).relative_to(folder.path))


def read_run(folder: RunFolder) -> tuple[Run, dict[str, Any]]:
    """The run of a folder, and everything else its run.json says."""
    record = folder.read_json("run.json")
    return from_folder_json(record["run"], folder.path), record


def resume(
    old: Run, run: Run, folder: RunFolder, prepared: Prepared, loader: Loader, say: Say
) -> Session:
    """Continue in a locked folder from its newest intact checkpoint (or from the start).

    What is to be known of it goes to `say`, and into the session's notes.
    """
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        say(text)

    _, record = read_run(folder)
    precision = record["precision"]
    if prepared.digest != record["data"]["digest"]:
        raise ValueError(
            f"the data has changed since this run began (now {prepared.folder}): "
            "restore the files as they were, or start a new run"
        )
    changed = inexact_changes(old, run)
    if changed:
        note(f"not equal to the last bit from here on, because of {', '.join(changed)}")
    device = device_of(run)
    threads = run.threads or record["threads"]
    torch.set_num_threads(threads)
    path = checkpoint.latest_intact(folder.checkpoints, say=note)
    state = new_state(run, device)
    if path is not None:
        tensors, counters = checkpoint.load(path)
        state.restore(tensors, counters)
    cut = folder.cut_metrics(state.step)
    if cut.unreadable:
        note(f"{cut.unreadable} torn line(s) of metrics were left out")
    note(f"continuing from step {state.step}")
    session = _session(run, folder, prepared, loader, state, device, precision)
    return dataclasses.replace(session, notes=tuple(notes))


def _session(
    run: Run,
    folder: RunFolder,
    prepared: Prepared,
    loader: Loader,
    state: TrainState,
    device: torch.device,
    precision: str,
) -> Session:
    counts = count(state.model, run.sequence_length)
    ceiling = run.matmul_flops or matmul_rate(device, DTYPES[precision])
    return Session(run, folder, prepared, loader, state, device, precision, counts, ceiling)


def trial(
    run: Run, state: TrainState, loader: Loader, device: torch.device
) -> Callable[[torch.dtype], None]:
    """The short piece of real work by which `auto` compares precisions."""

    def work(dtype: torch.dtype) -> None:
        batch = loader.batch(0)
        micro = batch.rows(0, min(len(batch), run.micro_batch or len(batch), 4)).to(device)
        forward_backward(state.model, [micro], 0, dtype, run.recompute)
        state.model.zero_grad(set_to_none=True)

    return work


def describe(session: Session) -> dict[str, Any]:
    """What run.json says beside the recipe: versions, machine, sizes, the choices made."""
    counts = session.counts
    manifest = session.prepared.manifest
    return {
        "name": session.run.name,
        "fingerprint": fingerprint(session.run),
        "precision": session.precision,
        "threads": torch.get_num_threads(),
        "device": str(session.device),
        "matmul_flops": session.ceiling,
        "versions": {
            "moebius": moebius.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
        "command": sys.argv,
        "data": {"digest": session.prepared.digest, "folder": str(session.prepared.folder)},
        "manifest": manifest,
        "params_total": counts.total,
        "params_active_min": counts.active_min,
        "params_active_mean": counts.active_mean,
        "params_active_max": counts.active_max,
        "flops_per_token": counts.flops_train,
    }


def commit() -> str | None:
    """The git commit of this source tree, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
