"""Going on with a run: from its newest intact checkpoint, bit for bit, or with imported weights.

What may change of it is `train/change.py`'s to say; every check comes before the first byte that
is written.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from moebius import checkpoint
from moebius.checkpoint.manifest import STATE
from moebius.checkpoint.stored import stored_tensors
from moebius.config import (
    fingerprint,
    from_json,
    identity,
    kept_name,
    map_user_files,
    override,
    to_json,
)
from moebius.data.loader import Loader
from moebius.data.prepared import Prepared
from moebius.parallel.world import ALONE, World
from moebius.train.change import check_change, unborn, with_own_tokenizer
from moebius.train.folder import CODE, RunFolder
from moebius.train.run import TOKENIZER, Run, inexact_changes, to_folder_json
from moebius.train.sections import section_at, sections_of
from moebius.train.session import (
    Imported,
    Say,
    Session,
    device_of,
    in_force,
    new_session,
    read_run,
    relative,
    start,
)
from moebius.train.state import TrainState, new_state

# The counters of a run that has no checkpoint yet.
NOTHING: dict[str, Any] = {"step": 0, "tokens": 0}


def reopen(folder: RunFolder, overrides: Iterable[str]) -> tuple[Run, Run]:
    """The run of a folder, and what it becomes; ValueError where it may not. Writes nothing."""
    old, record = read_run(folder)
    new = with_own_tokenizer(override(old, overrides), folder.path, record)
    _check(folder, record, old, new)
    return old, new


def rejoin(folder: RunFolder, given: Run) -> tuple[Run, Run]:
    """The run of a folder, and what it becomes by the recipe given once more, as `reopen` does.

    The user's files are found to be those that the run began with by what is in them.
    """
    old, record = read_run(folder)

    def kept(file: str) -> str:
        path = Path(file)
        copy = folder.path / CODE / kept_name(path.stem, path.read_bytes())
        return str(copy if copy.is_file() else path)

    new = with_own_tokenizer(
        from_json(Run, map_user_files(to_json(given), kept)), folder.path, record
    )
    own = folder.path / TOKENIZER
    file = None if given.data.tokenizer is None else Path(given.data.tokenizer)
    if file is not None and file.is_file() and own.is_file():
        if file.read_bytes() != own.read_bytes():
            raise ValueError(f"{file} is not the tokenizer that this run began with; restore it")
        data = dataclasses.replace(new.data, tokenizer=str(own))
        new = dataclasses.replace(new, data=data)
    _check(folder, record, old, new)
    return old, new


def _check(folder: RunFolder, record: dict[str, Any], old: Run, new: Run) -> None:
    if identity(old) == identity(new):
        return
    path = _newest(folder, record, _unheard, only=[STATE])
    counters = NOTHING if path is None else json.loads((path / STATE).read_bytes())
    check_change(old, new, record, counters)


def _newest(
    folder: RunFolder,
    record: dict[str, Any],
    say: Say,
    only: list[str] | None = None,
    world: World = ALONE,
) -> Path | None:
    """The newest intact checkpoint; imported weights, unlike drawn ones, cannot be without."""
    path = checkpoint.latest_intact(folder.checkpoints, say=say, only=only, world=world)
    if path is None and "imported" in record:
        raise ValueError(f"the imported weights of {folder.path} are gone; import them again")
    return path


def _unheard(text: str) -> None:
    """For what `resume` says again, once the folder is locked."""


def resume(
    old: Run,
    run: Run,
    folder: RunFolder,
    prepared: Prepared,
    all_loaders: tuple[Loader, ...],
    say: Say,
    world: World = ALONE,
) -> Session:
    """Continue in a locked folder from its newest intact checkpoint (or from the start).

    What is to be known of it goes to `say`, and into the session's notes.
    """
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        say(text)

    _, record = read_run(folder)
    path = _newest(folder, record, note, world=world)
    tensors, counters = ({}, NOTHING) if path is None else stored_tensors(path)
    check_change(old, run, record, counters)
    if unborn(record, counters):
        if world.main:
            folder.cut_metrics(0)
        imported = Imported(tensors, record)
        session = start(run, folder, prepared, all_loaders, imported, world)
        note("beginning with the imported weights; optimizer and random state are fresh")
        return dataclasses.replace(session, notes=tuple(notes))
    if prepared.digest != record["data"]["digest"]:
        raise ValueError(
            f"the data has changed since this run began (now {prepared.folder}): "
            "restore the files as they were, or start a new run"
        )
    changed = inexact_changes(old, run)
    # Checkpoints of runs before there were layouts name none.
    layout = counters.get("layout", world.describe())
    if layout != world.describe() and not any(text.startswith("parallel") for text in changed):
        changed.append(f"another layout ({world.describe()}, before: {layout})")
    if changed:
        note(f"not equal to the last bit from here on, because of {', '.join(changed)}")
    device = device_of(run)
    torch.set_num_threads(run.threads or record["threads"])
    section = section_at(sections_of(run), counters["step"])
    state = new_state(in_force(run, section, record["precision"]), device, world)
    if path is not None:
        state.restore(tensors, counters)
    world.wait()
    cut = folder.cut_metrics(state.step) if world.main else None
    if cut is not None and cut.unreadable:
        note(f"{cut.unreadable} torn line(s) of metrics were left out")
    if world.main and identity(old) != identity(run):
        for text in extend(folder, record, old, run, state):
            note(text)
    note(f"continuing from step {state.step}")
    if section.index:
        note(section.describe())
    session = new_session(run, folder, prepared, all_loaders, state, record["precision"])
    return dataclasses.replace(session, notes=tuple(notes))


def extend(
    folder: RunFolder, record: dict[str, Any], old: Run, run: Run, state: TrainState
) -> list[str]:
    """Write the new plan into run.json, the old one beside it; what has changed, in words."""
    longer = dataclasses.replace(old, stages=run.stages, steps=run.steps)
    plain = to_folder_json(longer, lambda path: relative(folder, path))
    was = {"steps": old.steps, "stages": record["run"].get("stages", [])}
    change = {"step": state.step, "tokens": state.tokens, "before": was}
    # The summary is that of the shorter run.
    folder.set_aside("summary.json", state.step)
    new = {"run": plain, "fingerprint": fingerprint(longer)}
    folder.write_json("run.json", {**record, **new, "plans": [*record.get("plans", []), change]})
    texts = [
        section.describe() for section in sections_of(run)[1:] if section.first_step >= state.step
    ]
    if run.steps != old.steps:
        texts.append(_horizon(old, run, state))
    return [f"new plan: {text}" for text in texts]


def _horizon(old: Run, run: Run, state: TrainState) -> str:
    """What a longer horizon does to the learning rate."""
    tokens, step = run.tokens_per_step(), state.step
    text = f"the schedule's horizon is {run.steps} steps, no longer {old.steps}; the learning rate "
    text += f"of step {step + 1} is {state.optimizer.lr(step, run.steps, tokens):.4g}"
    if step < old.steps:
        return f"{text} (instead of {state.optimizer.lr(step, old.steps, tokens):.4g})"
    return f"{text} (that of step {step} was {state.optimizer.lr(step - 1, old.steps, tokens):.4g})"
