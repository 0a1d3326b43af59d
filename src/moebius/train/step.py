"""One training step: forward and backward over micro-batches, clip, update, controllers.

A non-finite loss or gradient skips the update: weights, moments and router biases stay, data and
schedule move on.
"""

import dataclasses
import math
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from moebius.data.loader import Batch
from moebius.model.ffn import RouteStats
from moebius.model.ffn.moe import balance_rules
from moebius.model.lm import LM
from moebius.monitor.tap import Observer, observing
from moebius.ops.ranks import first, packed, size_of, summed
from moebius.optim.optimizer import clip_
from moebius.parallel.plan import gathered_no_more, local
from moebius.parallel.world import World
from moebius.train.passes import Stats, context_of, passes
from moebius.train.qk_clip import Clipped, logits_by_mixer
from moebius.train.run import Run
from moebius.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step did. `loss` is the mean cross-entropy in nats, pure of added losses."""

    loss: float
    grad_norm: float
    num_targets: int
    applied: bool
    sums: dict[str, float]
    stats: Stats
    update_ratios: dict[str, Tensor]
    # What QK-Clip saw and did; None where it did not look.
    clipped: Clipped | None


def train_step(
    run: Run,
    state: TrainState,
    batch: Batch,
    dtype: torch.dtype,
    observer: Observer | None,
    measure: bool,
) -> StepResult:
    """Do step `state.step` on its global batch and count it."""
    model, world = state.model, state.weights.world
    for weight in model.parameters():
        weight.grad = None
    own = own_part(batch, world)
    micro_batches = own.split(micro_rows(run, own, world.degrees.pipe.ranks))
    with observing(observer):
        total, sums, stats = passes(state, micro_batches, dtype, run.recompute)
    total, *values = packed([total, *sums.values()], partial(_of_all, world))
    sums, stats = dict(zip(sums, values, strict=True)), over_ranks(stats, world)
    grads = {slot.name: _gradient(weight) for slot, weight in state.weights.slots}
    norm = float(clip_(list(grads.values()), run.optim.clip, world.ranks.weights))
    loss = float(total) / batch.num_targets
    applied = math.isfinite(loss) and math.isfinite(norm)
    ratios: dict[str, Tensor] = {}
    clipped: Clipped | None = None
    if applied:
        ratios = state.optimizer.step(
            grads,
            step=state.step,
            total_steps=run.steps,
            tokens_per_step=run.tokens_per_step(),
            measure=measure,
        )
        after_step(model, stats, state.step)
        if run.qk_clip is not None and run.qk_clip.due(state.step):
            one = batch.rows(0, 1)
            found = logits_by_mixer(model, one, context_of(one, state.step), dtype)
            gathered_no_more(model)
            clipped = run.qk_clip.clip(found, state.weights.scale_rows, world.everyone)
            state.clipped_heads += clipped.heads
    state.bad_in_a_row = 0 if applied else state.bad_in_a_row + 1
    state.skipped += not applied
    state.step += 1
    state.tokens += batch.num_targets
    means = {name: float(value) for name, value in sums.items()}
    return StepResult(loss, norm, batch.num_targets, applied, means, stats, ratios, clipped)


def own_part(batch: Batch, world: World) -> Batch:
    """What a rank reads of a global batch.

    The objective is the sum of what all ranks compute, and those of a tensor group compute the loss
    of the same tokens: each target counts once for each of them.
    """
    own = batch.shard(*world.reader)
    return dataclasses.replace(own, num_targets=own.num_targets * size_of(world.ranks.tensor))


def micro_rows(run: Run, batch: Batch, ranks: int = 1) -> int:
    """Sequences of a micro-batch of those a rank reads, on a pipeline of so many ranks.

    In a stage of other lengths as many as hold as many tokens.
    """
    return rows_of(run, len(batch), batch.tokens_BT.shape[1], ranks)


def rows_of(run: Run, rows: int, length: int, ranks: int = 1) -> int:
    """The same, of so many sequences of a length."""
    if run.micro_batch is None:
        return max(1, rows // ranks)
    return max(1, run.micro_batch * run.sequence_length // length)


def _gradient(weight: Tensor) -> Tensor:
    return local(torch.zeros_like(weight) if weight.grad is None else weight.grad)


def _of_all(world: World, x: Tensor) -> Tensor:
    """The sum over other tokens and other layers."""
    return summed(summed(x, world.ranks.data), world.line)


def over_ranks(stats: Stats, world: World) -> Stats:
    """What the routers did on all ranks, the same bits on each: biases that follow it never drift.

    Ranks of a pipeline have none of other layers. Those of a tensor group route the same tokens,
    but not on every device to the last bit.
    """

    def told(x: Tensor) -> Tensor:
        return first(_of_all(world, x), world.ranks.tensor)

    every = [x for layer in stats for routed in layer for x in routed.tensors()]
    if world.everyone is None or not every:
        return stats
    left = iter(packed(every, told))
    return tuple(
        tuple(RouteStats(*islice(left, len(routed.tensors()))) for routed in layer)
        for layer in stats
    )


def after_step(model: LM, stats: Stats, step: int) -> None:
    """Let the balance rules of every router see what the whole global batch did."""
    for block, layer_stats in zip(model.blocks(), stats, strict=True):
        for rules, routed in zip(balance_rules(block), layer_stats, strict=True):
            for rule in rules:
                rule.after_step(routed, step)
