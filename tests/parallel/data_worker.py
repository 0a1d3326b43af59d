"""Trains on one process and on layouts of these ranks; what became of each, for `test_data.py`.

Arguments: where to write, then JSON of cases `[recipe, overrides, [layouts]]`. Each rank trains the
run alone first, which is what its layouts are compared with.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.checkpoint import complete
from moebius.checkpoint.stored import stored_tensors
from moebius.config import from_json, override
from moebius.data.loader import Batch
from moebius.model.block import BlockConfig
from moebius.model.block.prenorm import PreNorm
from moebius.model.mixers.cla import CLA
from moebius.model.mixers.gqa import GQA
from moebius.optim.roles import default_roles
from moebius.optim.rules.adamw import AdamW
from moebius.optim.rules.schedule_free import ScheduleFree
from moebius.optim.rules.soap import SOAP
from moebius.parallel.config import Parallel
from moebius.parallel.plan import local
from moebius.parallel.world import ALONE, World, laid_out
from moebius.recipes import recipe as published
from moebius.train.precision import DTYPES
from moebius.train.run import Run
from moebius.train.state import TrainState, new_state
from moebius.train.step import StepResult, train_step
from tests import tiny

Found = dict[str, Any]
TINY = {
    each.__name__: each for each in (tiny.tiny, tiny.pattern, tiny.wild, tiny.tower, tiny.column)
}


def wider() -> Run:
    """hunyuan-nano, its one pair of layers twice, with two key and value heads."""
    run = published("hunyuan-nano")
    layers: list[BlockConfig] = []
    for layer in run.model.layers:
        assert isinstance(layer, PreNorm) and isinstance(layer.mixer, CLA)
        assert isinstance(layer.mixer.of, GQA)
        mixer = dataclasses.replace(layer.mixer, of=dataclasses.replace(layer.mixer.of, kv_heads=2))
        layers.append(dataclasses.replace(layer, mixer=mixer))
    model = dataclasses.replace(run.model, layers=2 * tuple(layers))
    return dataclasses.replace(run, model=model)


def averaged() -> Run:
    """Schedule-Free for all weights, whose checkpoints hold the averages."""
    run, rule = tiny.tiny(), ScheduleFree()
    roles = default_roles(rule, rule)
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, roles=roles))


def soaped() -> Run:
    """SOAP for matrices and experts, whose bases turn at every second step, of sides of 16."""
    run, soap = tiny.tiny(), SOAP(frequency=2, max_precondition_dim=16)
    roles = default_roles(soap, AdamW())
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, roles=roles))


OWN = {**TINY, "hunyuan-nano, wider": wider, "soaped": soaped, "averaged": averaged}


def batch_of(run: Run, step: int) -> Batch:
    """Random tokens in documents of random lengths, the last positions of a sequence not valid."""
    draw = torch.Generator().manual_seed(1000 + step)
    shape = (run.batch, run.sequence_length)
    tokens = torch.randint(0, run.vocab, (shape[0], shape[1] + 1), generator=draw)
    document = (torch.rand(shape, generator=draw) < 0.1).cumsum(1)
    position = torch.zeros(shape, dtype=torch.int64)
    for t in range(1, shape[1]):
        same = document[:, t] == document[:, t - 1]
        position[:, t] = torch.where(same, position[:, t - 1] + 1, 0)
    length = torch.randint(shape[1] // 2, shape[1] + 1, (shape[0], 1), generator=draw)
    valid = torch.arange(shape[1]) < length
    sequences = torch.arange(shape[0]) + step * shape[0]
    fields = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), document, position, valid)
    return Batch(*fields, sequences, int(valid.sum()), ((),) * shape[0])


def whole(state: TrainState) -> dict[str, Tensor]:
    """Every tensor of the state, of several ranks put together from what each has to save."""
    own = {
        name: [(x.tensor.detach(), x.shape, x.row, x.column) for x in some]
        for name, some in state.fragments().items()
    }
    gathered: list[Any] = [own] * state.weights.world.size
    if state.weights.world.size > 1:
        dist.all_gather_object(gathered, own)
    found: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    for name, (x, shape, row, column) in (
        (name, one) for rank in gathered for name, some in rank.items() for one in some
    ):
        place = tuple(slice(n, n + size) for n, size in zip((row, column), x.shape, strict=False))
        found.setdefault(name, torch.empty(shape, dtype=x.dtype))[place] = x
        times.setdefault(name, torch.zeros(shape, dtype=torch.int8))[place] += 1
    assert all(bool((count == 1).all()) for count in times.values())
    return dict(sorted(found.items()))


def gradients(state: TrainState) -> dict[str, Tensor]:
    """Every gradient of the last step, whole (after clipping)."""
    found: dict[str, Tensor] = {}
    for slot, weight in state.weights.slots:
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        part = local(grad)
        found[slot.name] = part.clone() if slot.shard is None else slot.shard.whole(part)
    return found


def trained(run: Run, world: World, steps: int) -> tuple[list[StepResult], Found]:
    """Results of all steps; gradients of the first, and every tensor of the state in the end."""
    state = new_state(run, torch.device("cpu"), world)
    dtype = DTYPES[run.precision]
    results = [train_step(run, state, batch_of(run, 0), dtype, None, True)]
    first = {f"grad.{name}": grad for name, grad in gradients(state).items()}
    for step in range(1, steps):
        results.append(train_step(run, state, batch_of(run, step), dtype, None, True))
    last = whole(state)
    if world.size > 1:
        check_restored(run, world, state, last)
    return results, first | last


def check_restored(run: Run, world: World, state: TrainState, tensors: Found) -> None:
    """Ranks go on from what they saved; averaged weights may differ by the rounding of averages."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(world.told(folder))
        state.save(place, 1, {})
        saved, counters = stored_tensors(complete(place)[-1])
        again = new_state(run, torch.device("cpu"), world)
        again.restore(saved, counters)
        world.wait()
    assert counters == state.counters()
    for name, x in whole(again).items():
        assert distance(tensors[name].double(), x.double()) < 1e-14, name


def distance(one: Tensor, other: Tensor) -> float:
    """Relative, in the norm of the tensor."""
    size = float(one.double().norm())
    return float((one.double() - other.double()).norm()) / (size or 1.0)


def off(one: float, other: float) -> float:
    """The relative difference of two numbers."""
    return abs(one - other) / (abs(one) or 1.0)


def clipped_heads(results: list[StepResult]) -> int:
    """How many QK-Clip scaled down, in all steps together."""
    return sum(0 if one.clipped is None else one.clipped.heads for one in results)


def compare(alone: tuple[list[StepResult], Found], spread: tuple[list[StepResult], Found]) -> Found:
    """The largest differences by kind, and how many tensors there are of each."""
    (results, tensors), (others, found) = alone, spread
    tensors = {name: x for name, x in tensors.items() if not name.startswith("random.")}
    found = {name: x for name, x in found.items() if not name.startswith("random.")}
    buffers = [name for name in tensors if ".rules." in name]
    rest = [name for name in tensors if name not in buffers]
    pairs = list(zip(results, others, strict=True))
    # Loads, FFN experts a token, tokens, and what a capacity dropped or recycled.
    counts = [
        pair
        for one, other in pairs
        for x, y in zip(one.stats, other.stats, strict=True)
        for a, b in zip(x, y, strict=True)
        for pair in zip(a.tensors(), b.tensors(), strict=True)
        if not pair[0].is_floating_point()
    ]
    return {
        "names": sorted(tensors) == sorted(found),
        "loss": max(off(a.loss, b.loss) for a, b in pairs),
        "norm": max(off(a.grad_norm, b.grad_norm) for a, b in pairs),
        "sums": max((off(a.sums[k], b.sums[k]) for a, b in pairs for k in a.sums), default=0.0),
        "ratios": max(
            off(float(ratio), float(b.update_ratios[role]))
            for a, b in pairs
            for role, ratio in a.update_ratios.items()
        ),
        "worst": max((distance(tensors[name], found[name]), name) for name in rest),
        "buffers": all(torch.equal(tensors[name], found[name]) for name in buffers),
        "counts": all(torch.equal(a, b) for a, b in counts),
        "num_buffers": len(buffers),
        "num_counts": len(counts),
        "clipped_heads": [
            sum(r.clipped.heads for r in runs if r.clipped) for runs in (results, others)
        ],
    }


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    dist.init_process_group("gloo")
    ranks, found = dist.get_world_size(), []
    for recipe, overrides, steps, layouts in cases:
        whole_run = OWN[recipe]() if recipe in OWN else published(recipe)
        run = override(whole_run, overrides)
        alone = trained(run, ALONE, steps)
        for layout in layouts:
            parallel = from_json(Parallel, layout)
            world = laid_out(parallel.on(ranks), "cpu")
            spread = dataclasses.replace(run, parallel=parallel)
            result = compare(alone, trained(spread, world, steps))
            found.append({"recipe": recipe, "layout": layout, **result})
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
