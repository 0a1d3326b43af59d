"""`moebius bench precision`: what a training step costs in each low-precision format, beside bf16.

Where a CPU rounds in a kernel, the step is timed with torch's own operations too: both must give
the same losses to the last bit, and the same gradient norms.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from moebius.bench.settled import begun, opened
from moebius.bench.timing import interleaved, machine
from moebius.ops.formats import Format
from moebius.ops.formats.quantise import BACKENDS, choose
from moebius.train.precision import DTYPES
from moebius.train.run import Run
from moebius.train.session import Progress
from moebius.train.state import TrainState
from moebius.train.step import train_step

BESIDE, BY_TORCH = "bf16", ", rounded by torch"


def bench_precision(
    run: Run, *, repeats: int = 10, progress: Progress | None = None
) -> dict[str, Any]:
    """Time a step of a recipe in every format; a dict of machine facts and `rows`."""
    loader, device = opened(run, progress)
    batch = loader.batch(0).to(device)
    kernel = choose(torch.empty(0, device=device), torch.bfloat16)
    works: dict[str, Callable[[], object]] = {}
    found: dict[str, list[tuple[float, float]]] = {}

    def step(name: str, state: TrainState, own: Run, backend: str) -> None:
        with _rounding_by(backend):
            result = train_step(own, state, batch, torch.bfloat16, None, False)
        found[name].append((result.loss, result.grad_norm))

    for precision in (BESIDE, *Format.TABLE):
        own = dataclasses.replace(run, precision=precision, products={})
        for backend in (kernel,) if precision == BESIDE else dict.fromkeys((kernel, "plain")):
            name = precision if backend == kernel else precision + BY_TORCH
            state, _ = begun(own, loader, device)
            works[name], found[name] = partial(step, name, state, own, backend), []
    seconds = interleaved(works, device, repeats)
    rows: list[dict[str, Any]] = []
    for name, spent in seconds.items():
        twin = name.removesuffix(BY_TORCH) if name.endswith(BY_TORCH) else name + BY_TORCH
        agrees = found[name] == found.get(twin, found[name])
        row = {"name": name, "seconds": spent, "tokens_per_second": run.tokens_per_step() / spent}
        if name != BESIDE:
            row |= {"agrees": agrees, "over_bf16": spent / seconds[BESIDE] if agrees else None}
        rows.append(row)
    return {**machine(device, DTYPES[BESIDE], run.matmul_flops), "notes": [], "rows": rows}


@contextlib.contextmanager
def _rounding_by(backend: str) -> Iterator[None]:
    """Let the tensors that the kernel would round be rounded so."""
    kernel = BACKENDS["native"]
    BACKENDS["native"] = BACKENDS[backend]
    try:
        yield
    finally:
        BACKENDS["native"] = kernel
