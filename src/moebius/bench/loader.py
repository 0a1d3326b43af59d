"""`moebius bench loader`: tokens a second that the loader gives, beside what training steps take.

Batches are a pure function of the step, which is checked: the same step twice is the same batch.
"""

import itertools
from typing import Any

import torch

from moebius.bench.child import Child
from moebius.bench.memory import Memory
from moebius.bench.ours import SPEC
from moebius.bench.settled import opened, settled
from moebius.bench.timing import WARM_UP, interleaved, machine
from moebius.config import to_json
from moebius.data.loader import Batch
from moebius.train.precision import DTYPES
from moebius.train.run import Run
from moebius.train.session import Progress


def bench_loader(
    run: Run, *, repeats: int = 10, progress: Progress | None = None
) -> dict[str, Any]:
    """Time the loader and the step of a recipe; a dict of machine facts and `rows`."""
    loader, device = opened(run, progress)
    run, _, _ = settled(run, loader, device)
    memory, steps = Memory(torch.device("cpu")), itertools.count()
    memory.reset()
    agrees = all(_equal(loader.batch(step), loader.batch(step)) for step in range(3))
    with Child(SPEC, to_json(run), None) as child:
        works = {"loader": lambda: loader.batch(next(steps)), "step": child.step}
        seconds = interleaved(works, torch.device("cpu"), repeats, WARM_UP)
        step = child.step()
    rows = [
        {"name": name, "seconds": spent, "tokens_per_second": run.tokens_per_step() / spent}
        for name, spent in seconds.items()
    ]
    share = seconds["loader"] / seconds["step"] if agrees else None
    rows[0] |= {"share": share, "agrees": agrees, "peak_memory_bytes": memory.peak()}
    rows[1] |= {"agrees": None, "peak_memory_bytes": step["peak_memory_bytes"]}
    return {**machine(device, DTYPES[run.precision], run.matmul_flops), "rows": rows}


def _equal(one: Batch, other: Batch) -> bool:
    pairs = ((one.tokens_BT, other.tokens_BT), (one.targets_BT, other.targets_BT))
    return all(torch.equal(a, b) for a, b in pairs) and one.num_targets == other.num_targets
