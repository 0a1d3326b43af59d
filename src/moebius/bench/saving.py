"""`moebius bench saving`: what a training step takes longer for a checkpoint, by how it is written.

A turn is a plain step, a step with a checkpoint written beside the run, the steps until that one is
there, and a step that stands still for one. Both checkpoints must hold what the state was.
"""

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moebius import checkpoint
from moebius.bench.settled import begun, opened
from moebius.bench.timing import WARM_UP, machine, seconds_of
from moebius.data.loader import Batch
from moebius.train.precision import DTYPES
from moebius.train.run import Run
from moebius.train.session import Progress
from moebius.train.state import TrainState
from moebius.train.step import train_step

PLAIN, BESIDE, MEANWHILE = "step", "step, saved in the background", "steps while it is written"
STILL = "step, saved standing still"


def bench_saving(
    run: Run, *, repeats: int = 10, progress: Progress | None = None
) -> dict[str, Any]:
    """Time the four kinds of steps of a recipe; a dict of machine facts and `rows`."""
    loader, device = opened(run, progress)
    state, precision = begun(run, loader, device)
    batch = loader.batch(0).to(device)
    step = partial(_step, run, state, batch, DTYPES[precision])
    found: dict[str, list[float]] = {PLAIN: [], BESIDE: [], MEANWHILE: [], STILL: []}
    agrees = True
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(WARM_UP + repeats):
            seconds, same = _turn(step, state, Path(folder), device)
            agrees = agrees and same
            if progress is not None:
                progress("turns", turn + 1, WARM_UP + repeats)
            if turn >= WARM_UP:
                for name, spent in seconds.items():
                    found[name] += spent
    plain = statistics.median(found[PLAIN])
    rows: list[dict[str, Any]] = []
    for name, spent in found.items():
        if not spent:
            continue
        middle = statistics.median(spent)
        row = {"name": name, "seconds": middle, "tokens_per_second": run.tokens_per_step() / middle}
        if name != PLAIN:
            row |= {"over_plain": middle / plain if agrees else None, "agrees": agrees}
        rows.append(row)
    size = sum(x.numel() * x.element_size() for x in state.tensors().values())
    notes = [f"a checkpoint has {size / 2**20:,.0f} MiB"]
    return {
        **machine(device, DTYPES[precision], run.matmul_flops),
        "checkpoint_bytes": size,
        "notes": notes,
        "rows": rows,
    }


def _step(run: Run, state: TrainState, batch: Batch, dtype: torch.dtype) -> None:
    """A step of training, the same batch each time."""
    train_step(run, state, batch, dtype, None, False)


def _turn(
    step: partial[None], state: TrainState, folder: Path, device: torch.device
) -> tuple[dict[str, list[float]], bool]:
    """Seconds by kind, and whether both checkpoints hold what was saved."""
    background = checkpoint.Background()

    def saved(writer: checkpoint.Background | None) -> None:
        state.save(folder, 1, {}, writer)
        step()

    seconds: dict[str, list[float]] = {PLAIN: [seconds_of(step, device)], MEANWHILE: []}
    before = _saved(state)
    seconds[BESIDE] = [seconds_of(partial(saved, background), device)]
    while background.busy:
        seconds[MEANWHILE].append(seconds_of(step, device))
    background.wait()
    same = _holds(folder, before)
    before = _saved(state)
    seconds[STILL] = [seconds_of(partial(saved, None), device)]
    return seconds, same and _holds(folder, before)


def _saved(state: TrainState) -> dict[str, torch.Tensor]:
    """What a checkpoint of now has to hold."""
    with state.optimizer.evaluation_weights():
        return {name: x.clone() for name, x in state.tensors().items()}


def _holds(folder: Path, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether the newest checkpoint has these, bit for bit."""
    found, _ = checkpoint.load(checkpoint.complete(folder)[-1])
    return found.keys() == tensors.keys() and all(
        torch.equal(found[name], x.cpu()) for name, x in tensors.items()
    )
