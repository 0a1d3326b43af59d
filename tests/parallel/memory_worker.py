"""How much memory each rank takes to begin a run, and to go on with it, for `test_data.py`.

Arguments: where to write, a folder.
"""

import dataclasses
import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moebius.bench.memory import Memory, trim
from moebius.checkpoint import complete
from moebius.checkpoint.stored import stored_tensors
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.moe import MoE
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.parallel.config import Parallel
from moebius.parallel.world import laid_out
from moebius.train.state import TrainState, new_state
from tests import tiny


def held_by(state: TrainState) -> int:
    """Bytes of weights and moments."""
    own = [x for x in state.tensors().values() if x.is_floating_point() and not x.is_meta]
    return sum(4 * x.numel() for x in own)


def main() -> None:
    dist.init_process_group("gloo")
    world = laid_out(Parallel().on(dist.get_world_size()), "cpu")
    moe = MoE(experts=32, top_k=4, expert_width=512)
    layer = PreNorm(GQA(heads=8, kv_heads=4, head_width=128), moe)
    model = ModelConfig(width=1024, layers=8 * (layer,))
    memory = Memory(torch.device("cpu"))
    run = dataclasses.replace(tiny.tiny(), model=model, vocab=8000)
    state = new_state(run, torch.device("cpu"), world)
    begun, folder = memory.peak() or 0, Path(sys.argv[2])
    whole = sum(4 * torch.Size(shard.shape).numel() for shard in state.weights.shards.values())
    held = held_by(state)
    state.save(folder, 1, {})
    del state
    gc.collect()
    trim()
    world.wait()
    memory.reset()
    state = new_state(run, torch.device("cpu"), world)
    state.restore(*stored_tensors(complete(folder)[-1]))
    grown: list[list[int] | None] = [None] * world.size
    dist.all_gather_object(grown, [begun, memory.peak() or 0, held])
    if world.main:
        Path(sys.argv[1]).write_text(json.dumps({"whole": whole, "ranks": grown}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
