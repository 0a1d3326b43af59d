"""In which dtype ranks gather weights, and what that changes; for `test_data.py`.

Argument: where to write.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from moebius.config import override
from moebius.model.weight import named_weights
from moebius.parallel.config import Parallel
from moebius.parallel.world import ALONE, World, laid_out
from moebius.train.precision import DTYPES
from moebius.train.run import Run
from moebius.train.state import TrainState, new_state
from moebius.train.step import train_step
from tests import tiny
from tests.parallel.data_worker import batch_of, distance, gradients, off


def gathered(state: TrainState, run: Run) -> dict[str, list[str]]:
    """The dtypes of the weights of layers, by their role, while they are gathered."""
    with torch.device("meta"):
        roles = {name: w.role for name, w in named_weights(run.model.build(run.vocab))}
    found: dict[str, set[str]] = defaultdict(set)
    units = [module for module in state.model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    for name, weight in state.model.named_parameters():
        if name.startswith("layers."):
            found[roles[name]].add(str(weight.dtype))
    for unit in units:
        unit.reshard()
    return {role: sorted(dtypes) for role, dtypes in found.items()}


def one(run: Run, world: World) -> dict[str, Any]:
    """A step of the ranks, and how far it is from that of one process."""
    batch, dtype = batch_of(run, 0), DTYPES[run.precision]
    states = [new_state(run, torch.device("cpu"), place) for place in (ALONE, world)]
    alone, spread = (train_step(run, state, batch, dtype, None, True) for state in states)
    grads = [gradients(state) for state in states]
    return {
        "dtypes": gathered(states[1], run),
        "loss": off(alone.loss, spread.loss),
        "gradients": max(distance(x, grads[1][name]) for name, x in grads[0].items()),
    }


def main() -> None:
    dist.init_process_group("gloo")
    world, found = laid_out(Parallel().on(dist.get_world_size()), "cpu"), {}
    for precision in ("bf16", "fp32"):
        run = override(tiny.pattern(), [f"precision={precision}"])
        found[precision] = one(run, world)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
