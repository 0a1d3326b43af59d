"""Does a MoE reach its dense twin's loss in less time? Both are trained in turn, by the clock.

The twin differs in its feed-forwards alone, which have the MoE's active parameters. Each model has
its own peak rate and a whole schedule over its own steps; the MoE may have fewer, so that its
decayed run ends before the twin's. They see the same data in the same order and take turns in one
process, a stretch of steps each, so that what else the machine does falls on both. The clock counts
batches and steps, not evaluations: the loss is that of all held-out documents, as training goes.
"""

import contextlib
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from moebius.checkpoint.files import replace_file
from moebius.data.loader import Loader, heldout_batches
from moebius.data.prepared import Prepared
from moebius.lab.draw import write_charts
from moebius.lab.race_result import NAMES, compared, race_charts, says, summary
from moebius.lab.trained import check_unbegun
from moebius.monitor.ceiling import synchronise
from moebius.monitor.runs import read_json
from moebius.train.folder import RunFolder
from moebius.train.passes import context_of
from moebius.train.run import Run
from moebius.train.session import Progress, Say, Session, check, open_stages, start, trial
from moebius.train.step import train_step
from moebius.train.twin import dense_twin


@dataclasses.dataclass(frozen=True)
class Race:
    """The rate of each model and the MoE's steps, where they are not the recipe's own."""

    moe_lr: float | None = None
    dense_lr: float | None = None
    moe_steps: int | None = None
    seeds: int = 3
    # How often a model is evaluated on its way, the end included.
    looks: int = 20

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.looks < 1:
            raise ValueError(f"seeds={self.seeds} and looks={self.looks} must be at least 1")

    def runs(self, run: Run) -> dict[str, Run]:
        """Both runs of a recipe; ValueError where they cannot be compared."""
        if run.batch_ramp or run.stages:
            raise ValueError("a race compares steps of one batch; leave out batch_ramp and stages")
        twin = dense_twin(run)
        if twin.model == run.model:
            raise ValueError(f"{run.name} has no MoE layer, so it is its own dense twin")
        moe = dataclasses.replace(run, steps=self.moe_steps or run.steps)
        found = {"moe": _at(moe, self.moe_lr), "dense": _at(twin, self.dense_lr)}
        short = [name for name, each in found.items() if each.steps < self.looks]
        if short:
            raise ValueError(
                f"{' and '.join(short)} trains fewer steps than it is looked at ({self.looks}); "
                "give fewer looks"
            )
        return found


def _at(run: Run, lr: float | None) -> Run:
    return (
        run if lr is None else dataclasses.replace(run, optim=dataclasses.replace(run.optim, lr=lr))
    )


def race_experiment(
    race: Race, run: Run, out: Path, *, say: Say = print, progress: Progress | None = None
) -> dict[str, Any]:
    """Race every seed that has not been raced in `out`; `race.json`, `.html` and `.svg` there."""
    out = out.absolute()
    counts = {name: check(each) for name, each in race.runs(run).items()}
    rows: list[dict[str, Any]] = []
    for seed in range(run.seed, run.seed + race.seeds):
        seeded = dataclasses.replace(run, seed=seed, stop_at=None)
        rows.append(_seed(race.runs(seeded), race.looks, out / f"seed-{seed}", progress))
        say(f"seed {seed}: {says(rows[-1])}")
    result = {
        "run": run.name,
        "active": {name: counted.active_mean for name, counted in counts.items()},
        "total": {name: counted.total for name, counted in counts.items()},
        "lr": {name: each.optim.lr for name, each in race.runs(run).items()},
        "steps": {name: each.steps for name, each in race.runs(run).items()},
        "seeds": rows,
        **summary(rows),
    }
    replace_file(out / "race.json", [json.dumps(result, indent=2).encode(), b"\n"])
    title = f"{run.name} against its dense twin"
    write_charts(out / "race", title, result["says"], race_charts(rows))
    say(result["says"])
    return result


# --- one seed -------------------------------------------------------------------------------------


class _Racer:
    """A model on its way: its session, its clock and where its loss was."""

    def __init__(
        self, run: Run, folder: RunFolder, prepared: Prepared, loaders: tuple[Loader, ...]
    ) -> None:
        self.session: Session = start(run, folder, prepared, loaders)
        # What is compiled at first use is nobody's training.
        trial(run, self.session.state, loaders[0], self.session.device)(self.session.dtype)
        # [step, seconds of training, held-out loss]
        self.curve: list[tuple[int, float, float]] = []

    def advance(self, step: int) -> None:
        """Train up to a step, by the clock, and take the held-out loss beside it."""
        session, state = self.session, self.session.state
        while state.step < step:
            started = time.perf_counter()
            batch = session.loader.batch(state.step).to(session.device)
            train_step(session.run, state, batch, session.dtype, None, False)
            synchronise(session.device)
            state.seconds += time.perf_counter() - started
            if state.bad_in_a_row >= session.run.max_bad_steps:
                raise ValueError(
                    f"{session.run.name} diverged at step {state.step}; give it a lower rate"
                )
        # With schedule_free the averages are judged, not the weights in training.
        with state.optimizer.evaluation_weights():
            self.curve.append((state.step, state.seconds, held_out_loss(session)))

    def result(self) -> dict[str, Any]:
        """What became of it."""
        state = self.session.state
        return {
            "steps": state.step,
            "tokens": state.tokens,
            "skipped_steps": state.skipped,
            "precision": self.session.precision,
            "seconds": self.curve[-1][1],
            "loss": self.curve[-1][2],
            "curve": [list(point) for point in self.curve],
        }


def _seed(
    runs: dict[str, Run], looks: int, folder: Path, progress: Progress | None
) -> dict[str, Any]:
    """Race one pair, or read the race that was run; one that was broken off begins anew."""
    new = [check_unbegun(runs[name], folder / name) for name in NAMES]
    if not any(new) and (folder / "race.json").is_file():
        return read_json(folder / "race.json")
    for name in NAMES:
        shutil.rmtree(folder / name, ignore_errors=True)
    racers: dict[str, _Racer] = {}
    with contextlib.ExitStack() as locks:
        for name in NAMES:
            prepared, loaders = open_stages(runs[name], progress)
            place = RunFolder.at(folder / name)
            locks.enter_context(place.lock())
            racers[name] = _Racer(runs[name], place, prepared, loaders)
        for look in range(1, looks + 1):
            # Neither is always the first of a turn.
            for name in NAMES if look % 2 else reversed(NAMES):
                racers[name].advance(round(look * runs[name].steps / looks))
            if progress is not None:
                progress(f"race of seed {runs['moe'].seed}", look, looks)
        for racer in racers.values():
            racer.session.save()
            racer.session.saver.wait()
    row = {"seed": runs["moe"].seed, **compared(*(racers[name].result() for name in NAMES))}
    replace_file(folder / "race.json", [json.dumps(row, indent=2).encode(), b"\n"])
    return row


@torch.no_grad()
def held_out_loss(session: Session) -> float:
    """Mean cross-entropy in nats over every held-out token."""
    model, run = session.state.model, session.run
    model.eval()
    total, tokens = 0.0, 0
    for part in heldout_batches(session.prepared, run.sequence_length, run.batch):
        batch = part.to(session.device)
        given = (batch.tokens_BT, batch.targets_BT, context_of(batch, 0))
        total += float(model.loss(*given, dtype=session.dtype, with_ends=False).total)
        tokens += int(batch.valid_BT.sum())
    model.train()
    return total / tokens
