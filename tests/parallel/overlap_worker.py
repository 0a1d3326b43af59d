"""Ranks that hold parts of the experts of small models: `overlap_worker.py OUT`.

Experts are cut by hand and other gradients summed by hand, so nothing but the exchange is tested.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moebius.bench.link import Link
from moebius.data.loader import Batch
from moebius.model.ffn.moe import MoELayer
from moebius.model.lm import LM
from moebius.model.weight import initialise
from moebius.ops.ranks import Exchange, Ranks, Spread
from moebius.train.passes import context_of
from moebius.train.run import Run
from tests import tiny

EXCHANGES: tuple[Exchange, ...] = ("all_to_all", "all_gather")
ROWS = 5  # which two ranks share unevenly


def batch(seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 300, (ROWS, 33), generator=generator)
    position_BT = torch.arange(32).expand(ROWS, 32).contiguous()
    return Batch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        torch.zeros(ROWS, 32, dtype=torch.int64),
        position_BT,
        torch.ones(ROWS, 32, dtype=torch.bool),
        torch.arange(ROWS),
        ROWS * 32,
        ROWS * ((),),
    )


def built(run: Run, dtype: torch.dtype) -> LM:
    model = run.model.build(run.vocab)
    initialise(model, 0)
    return model.to(dtype)


def cut(model: LM, ranks: Ranks) -> set[str]:
    """Keep this rank's part of what parts want cut; the names of these weights."""
    found: set[str] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, Spread):
            names = module.spread(ranks).items()
            found |= {f"{prefix}.{name}" for name, part in names if part.group is not None}
    for name in found:
        weight = model.get_parameter(name)
        weight.data = weight.data.chunk(dist.get_world_size())[dist.get_rank()].clone()
    return found


def step(model: LM, own: Batch, recompute: bool, dtype: torch.dtype) -> Tensor:
    """The loss of some rows of a batch; gradients are left in the model."""
    ctx = context_of(own, 0)
    loss = model.loss(own.tokens_BT, own.targets_BT, ctx, dtype=dtype, recompute=recompute)
    (loss.total / ctx.num_targets).backward()
    return loss.total.detach()


def gradients(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """Whole gradients: parts side by side, all others summed."""
    whole: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        if name in names:
            pieces = [torch.empty_like(grad) for _ in range(dist.get_world_size())]
            dist.all_gather(pieces, grad)
            whole[name] = torch.cat(pieces)
        else:
            dist.all_reduce(grad)
            whole[name] = grad
    return whole


def starve(model: LM) -> None:
    """Let every token choose the same experts, so that a rank gets no rows."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            torch.nn.init.zeros_(module.router.get_parameter("w_ED"))


def parity(
    run: Run, exchange: Exchange, recompute: bool = False, starved: bool = False
) -> dict[str, Any]:
    """The largest relative errors to one process, and whether a second step has the same bits."""
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = built(run, torch.float64)
    several = built(run, torch.float64)
    if starved:
        starve(alone)
        starve(several)
    truth = step(alone, batch(), False, torch.float64)
    names = cut(several, Ranks(dist.group.WORLD, experts=dist.group.WORLD, exchange=exchange))
    own = batch().shard(rank, world)
    again: list[dict[str, Tensor]] = []
    for _ in range(2):
        several.zero_grad()
        total = step(several, own, recompute, torch.float64)
        dist.all_reduce(total)
        again.append(gradients(several, names))
    errors = {
        name: float((again[0][name] - grad).norm() / grad.norm().clamp(min=1e-30))
        for name, weight in alone.named_parameters()
        if (grad := weight.grad) is not None
    }
    return {
        "loss": abs(float(total / truth) - 1),
        "gradient": max(errors.values()),
        "experts": len(names),
        "same_bits": all(torch.equal(again[0][name], again[1][name]) for name in again[0]),
    }


def events(exchange: Exchange) -> list[str]:
    """What happened in a step of one ScMoE layer, in order."""
    model = built(tiny.tiny(), torch.float32)
    assert dist.group.WORLD is not None
    clocks = dist.new_group()
    assert isinstance(clocks, dist.ProcessGroup)
    link = Link(dist.group.WORLD, clocks)
    cut(model, Ranks(dist.group.WORLD, experts=link, exchange=exchange))
    for name, module in model.layers[0].named_children():
        link.watch(name, module)
    step(model, batch().shard(dist.get_rank(), dist.get_world_size()), False, torch.float32)
    return [event.what for event in link.events]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    result = {
        "parity": {
            f"{run.name} {exchange} {'recomputed' if recompute else 'kept'}": parity(
                run, exchange, recompute
            )
            for run, recompute in ((tiny.tiny(), False), (tiny.tiny(), True), (tiny.wild(), True))
            for exchange in EXCHANGES
        },
        "starved": {
            exchange: parity(tiny.pattern(), exchange, starved=True) for exchange in EXCHANGES
        },
        "events": {exchange: events(exchange) for exchange in EXCHANGES},
    }
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(result))
    dist.destroy_process_group()
