"""Setting up a training session: everything checked before anything is written, then everything
built.

A session is a run, its folder, its data, its state and the stage in force, ready for the loop.
"""

import dataclasses
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import moebius
from moebius.checkpoint import Background
from moebius.checkpoint.stored import Readable
from moebius.config import fingerprint, resolve
from moebius.data.loader import Loader
from moebius.data.prepare import prepare
from moebius.data.prepared import Prepared
from moebius.model.count import Counts, count
from moebius.model.lm import LM
from moebius.model.weight import named_weights
from moebius.monitor.ceiling import matmul_rate
from moebius.ops.native.memory import keep_freed_memory
from moebius.parallel.world import ALONE, World
from moebius.train.change import with_own_tokenizer
from moebius.train.folder import RunFolder
from moebius.train.layout import check_ranks
from moebius.train.passes import passes
from moebius.train.precision import DTYPES, choose
from moebius.train.run import TOKENIZER, Precision, Run, from_folder_json, to_folder_json
from moebius.train.sections import Section, loaders, section_at, sections_of
from moebius.train.state import TrainState, new_state
from moebius.train.step import micro_rows
from moebius.train.weights import optimizer_of, weights_of

# Seconds between two looks whether a checkpoint is there.
POLL = 0.1

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass
class Session:
    """What the loop needs."""

    run: Run
    folder: RunFolder
    prepared: Prepared
    # One of each for the steps before the first stage, and one for each stage.
    sections: tuple[Section, ...]
    loaders: tuple[Loader, ...]
    # The section in force.
    section: Section
    state: TrainState
    device: torch.device
    precision: str
    counts: Counts
    # FLOP/s of plain matrix products here, in the dtype of the run.
    ceiling: float
    world: World = ALONE
    # What was said while it was resumed.
    notes: tuple[str, ...] = ()
    # Who writes checkpoints while the run goes on.
    saver: Background = dataclasses.field(default_factory=Background)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return DTYPES[self.precision]

    @property
    def loader(self) -> Loader:
        """The batches of the section in force."""
        return self.loaders[self.section.index]

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed exactly."""
        layout = self.world.describe()
        return {"data": self.prepared.digest, "precision": self.precision, "layout": layout}

    def save(self) -> None:
        """Save a checkpoint of this moment, in the background where the run has it so."""
        self.settle()
        keep, background = self.run.keep_checkpoints, self.saver
        self.state.save(
            self.folder.checkpoints,
            keep,
            self.facts(),
            background if self.run.save_in_background else None,
        )

    def settle(self) -> None:
        """Until the checkpoint in hand is written; CheckpointError where it could not be.

        Ranks that wait ask again and again: one collective of minutes would be taken for lost.
        """
        while self.world.size > 1 and self.world.any(self.saver.busy):
            time.sleep(POLL)
        self.saver.wait()

    def enter_stage(self) -> str:
        """Go over to the next stage, as by a save and a resume; what now holds, in one line."""
        self.section = self.sections[self.section.index + 1]
        self.state.rebuild(in_force(self.run, self.section, self.precision), self.device)
        self.counts = counts_of(self.run, self.section)
        return self.section.describe()


def in_force(run: Run, section: Section, precision: str | None = None) -> Run:
    """The run with the model of a section, and the precision that was chosen, if one was."""
    chosen = run.precision if precision is None else cast(Precision, precision)
    return dataclasses.replace(run, model=section.model, precision=chosen)


def check(run: Run) -> Counts:
    """Build everything on the meta device, so that what does not fit is refused at once."""
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch finds no CUDA device here; use device=cpu")
    with torch.device("meta"):
        models = [section.model.build(run.vocab) for section in sections_of(run)]
        models[0].check_trainable()
        check_roles(run, models[0])
        if run.qk_clip is not None:
            run.qk_clip.check(models[0], run.optim)
        optimizer_of(run, weights_of(models[0]))
    check_ranks(run, models[0])
    run.optim.schedule.factor(0, run.steps, run.tokens_per_step())
    resolve(run.evaluation)
    for sink in run.sinks:
        sink.check()
    return count(models[0], run.sequence_length)


def counts_of(run: Run, section: Section) -> Counts:
    """The parameters and FLOPs of the model of a section, by building it without memory."""
    with torch.device("meta"):
        return count(section.model.build(run.vocab), section.sequence_length)


def check_roles(run: Run, model: LM) -> None:
    """ValueError where `products` names a role that no weight of the model has."""
    absent = sorted(run.products.keys() - {weight.role for _, weight in named_weights(model)})
    if absent:
        raise ValueError(f"products names {absent[0]}, but no weight of this model has that role")


def device_of(run: Run) -> torch.device:
    """The device a run computes on."""
    if run.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(run.device)


def open_data(run: Run, progress: Progress | None) -> tuple[Prepared, Loader]:
    """The prepared corpus and the loader of the run's first batches; raises as `open_stages`."""
    prepared, all_loaders = open_stages(run, progress)
    return prepared, all_loaders[0]


def open_stages(run: Run, progress: Progress | None) -> tuple[Prepared, tuple[Loader, ...]]:
    """The prepared corpus and a loader a section; ValueError where it cannot serve the run."""
    sections = sections_of(run)
    prepared = prepare(run.data, run.vocab, progress=progress)
    return prepared, loaders(run, sections, prepared)


@dataclasses.dataclass(frozen=True)
class Imported:
    """Weights that a run begins with, and what its run.json says already."""

    tensors: Mapping[str, Tensor | Readable]
    record: dict[str, Any]


def start(
    run: Run,
    folder: RunFolder,
    prepared: Prepared,
    all_loaders: tuple[Loader, ...],
    imported: Imported | None = None,
    world: World = ALONE,
) -> Session:
    """A new session in a locked folder: an empty one, or that of imported weights."""
    device = device_of(run)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    state = new_state(run, device, world)
    work = trial(run, state, all_loaders[0], device)
    precision, measured = choose(run.precision, device, work)
    precision = world.told(precision)
    if measured and world.size > 1:
        # Ranks gather weights in the dtype that they are multiplied in, now that it is known.
        del state, work
        state = new_state(in_force(run, sections_of(run)[0], precision), device, world)
    if imported is not None:
        state.take_weights(imported.tensors)
        # Some rules keep copies of the weights they begin with.
        state.optimizer = optimizer_of(run, state.weights)
    session = new_session(run, folder, prepared, all_loaders, state, precision)
    if not world.main:
        return session
    kept = to_folder_json(run, lambda path: relative(folder, path))
    if imported is None:
        folder.copy_in(prepared.folder / TOKENIZER, TOKENIZER)
    record = {} if imported is None else imported.record
    record = {**record, **describe(session), "run": kept, "precision_trial": measured}
    # Last, because with it the folder is a run that can be resumed.
    folder.write_json("run.json", record)
    return session


def relative(folder: RunFolder, path: Path) -> str:
    """A user's file, kept in the folder, by its place in it."""
    return str(Path(folder.keep_user_file(path)).relative_to(folder.path))


def read_run(folder: RunFolder) -> tuple[Run, dict[str, Any]]:
    """The run of a folder, and everything else its run.json says."""
    record = folder.read_json("run.json")
    run = from_folder_json(record["run"], folder.path)
    return with_own_tokenizer(run, folder.path, record), record


def new_session(
    run: Run,
    folder: RunFolder,
    prepared: Prepared,
    all_loaders: tuple[Loader, ...],
    state: TrainState,
    precision: str,
) -> Session:
    """A session around a state, at the section of the state's next step."""
    keep_freed_memory()
    sections, device = sections_of(run), device_of(run)
    section = section_at(sections, state.step)
    counts, world = counts_of(run, section), state.weights.world
    ceiling = world.size * (run.matmul_flops or matmul_rate(device, DTYPES[precision]))
    data = (prepared, sections, all_loaders, section)
    return Session(run, folder, *data, state, device, precision, counts, ceiling, world)


def trial(
    run: Run, state: TrainState, loader: Loader, device: torch.device
) -> Callable[[torch.dtype], None]:
    """The short piece of real work by which `auto` compares precisions."""

    def work(dtype: torch.dtype) -> None:
        batch, pipe = loader.batch(0), state.weights.world.degrees.pipe.ranks
        rows = min(micro_rows(run, batch, pipe), 4)
        micros = batch.rows(0, rows * pipe).to(device).split(rows)
        # Stochastic rounding draws; the run begins with the random state of its seed all the same.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            passes(state, micros, dtype, run.recompute)
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
