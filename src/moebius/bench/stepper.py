"""A model that a benchmark steps, and the place it stands in: one process, one device, one loader.

The place times steps, data loading included, with the part of the optimizer, and takes the peak of
memory above what was held before the model was built. All models of a run see the same batches.
"""

import dataclasses
import time
from abc import ABC, abstractmethod
from typing import Any

import torch

from moebius.bench.memory import Memory
from moebius.bench.timing import Stopwatch
from moebius.config import from_json
from moebius.data.loader import Batch, Loader
from moebius.monitor.ceiling import synchronise
from moebius.train.precision import DTYPES
from moebius.train.run import Run
from moebius.train.session import device_of, open_data


@dataclasses.dataclass
class Place:
    """What a model is given. `watch` times whatever the stepper runs inside it: its optimizer."""

    run: Run
    device: torch.device
    dtype: torch.dtype
    loader: Loader
    memory: Memory
    watch: Stopwatch
    steps: int = 0


class Stepper(ABC):
    """The contract of a model that is timed."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What its row says beside the times: `notes` at least, a list of texts."""

    @abstractmethod
    def step(self, batch: Batch) -> float:
        """One whole training step; the mean loss of the batch before the update, in nats."""

    def after(self) -> dict[str, Any]:
        """What its row says of the steps done."""
        return {}

    def split(self, place: Place, steps: int) -> dict[str, float]:
        """The parts of a step as shares of 1; empty where they cannot be told apart."""
        return {}


def place_of(run_json: Any) -> Place:
    """The place of a run whose precision is settled; its data must have been prepared."""
    run: Run = from_json(Run, run_json)
    device, dtype = device_of(run), DTYPES[run.precision]
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    _, loader = open_data(run, None)
    # Libraries that are loaded by the first product are no model's memory.
    warm = torch.ones(256, 256, device=device, dtype=dtype, requires_grad=True)
    (warm @ warm).sum().backward()
    synchronise(device)
    return Place(run, device, dtype, loader, Memory(device), Stopwatch(device))


def timed_step(place: Place, stepper: Stepper) -> dict[str, Any]:
    """One step, and what it took."""
    place.memory.reset()
    place.watch.take()
    synchronise(place.device)
    start = time.perf_counter()
    batch = place.loader.batch(place.steps).to(place.device)
    loaded = time.perf_counter()
    loss = stepper.step(batch)
    synchronise(place.device)
    seconds = time.perf_counter() - start
    place.steps += 1
    return {
        "seconds": seconds,
        "data_seconds": loaded - start,
        "optimizer_seconds": place.watch.take(),
        "loss": loss,
        "peak_memory_bytes": place.memory.peak(),
        "resident_bytes": place.memory.above(),
    }
