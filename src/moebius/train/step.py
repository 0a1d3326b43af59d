"""One training step: forward and backward over micro-batches, clip, update, controllers.

Every loss is a sum divided once by the global count of targets, so micro-batches simply add up. A
non-finite loss or gradient skips the update: weights, moments and router biases stay, data and
schedule move on.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moebius.data.loader import Batch
from moebius.model.context import Context
from moebius.model.ffn import RouteStats
from moebius.model.ffn.moe import balance_rules
from moebius.model.lm import LM
from moebius.monitor.tap import Observer, observing
from moebius.ops.ranks import Group, first, size_of, summed
from moebius.ops.sequences import places
from moebius.optim.optimizer import clip_
from moebius.parallel.plan import local
from moebius.parallel.world import World
from moebius.train.qk_clip import Clipped
from moebius.train.run import Run
from moebius.train.state import TrainState

Stats = tuple[tuple[RouteStats, ...], ...]


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


def context_of(batch: Batch, step: int) -> Context:
    """The model's context of a (micro-)batch."""
    return Context.packed(
        batch.position_BT,
        batch.document_BT,
        batch.valid_BT,
        batch.sequence_B,
        batch.num_targets,
        step,
    )


def forward_backward(
    model: LM,
    micro_batches: Sequence[Batch],
    step: int,
    dtype: torch.dtype,
    recompute: bool,
    sharers: Group = None,
) -> tuple[Tensor, dict[str, Tensor], Stats]:
    """Accumulate gradients of micro-batches; (cross-entropy sum, other sums, router stats).

    Of whole sequences, or of this rank's tokens of them where `sharers` have the others.
    """
    total: Tensor | None = None
    sums: dict[str, Tensor] = {}
    stats: Stats = ()
    for batch in micro_batches:
        ctx = context_of(batch, step)
        given_BT = (batch.tokens_BT, batch.targets_BT)
        if sharers is not None:
            place_T = places(batch.tokens_BT.shape[1], sharers, batch.tokens_BT.device)
            ctx, given_BT = ctx.at(place_T), tuple(x_BT[:, place_T] for x_BT in given_BT)
        loss = model.loss(*given_BT, ctx, dtype=dtype, recompute=recompute)
        (loss.total / ctx.num_targets).backward()
        total = loss.total.detach() if total is None else total + loss.total.detach()
        for name, value in loss.sums.items():
            sums[name] = sums[name] + value if name in sums else value
        stats = _add(stats, loss.stats) if stats else loss.stats
    assert total is not None
    return total, sums, stats


def _add(left: Stats, right: Stats) -> Stats:
    return tuple(
        tuple(a + b for a, b in zip(old, new, strict=True))
        for old, new in zip(left, right, strict=True)
    )


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
    micro_batches = own.split(micro_rows(run, own))
    with observing(observer):
        total, sums, stats = forward_backward(
            model, micro_batches, state.step, dtype, run.recompute, world.ranks.context
        )
    everyone = world.ranks.data
    total, stats = summed(total, everyone), over_ranks(stats, world)
    sums = {name: summed(value, everyone) for name, value in sums.items()}
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
            first = batch.rows(0, 1)
            clipped = run.qk_clip.apply(model, first, context_of(first, state.step), dtype)
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


def micro_rows(run: Run, batch: Batch) -> int:
    """Sequences of a micro-batch: in a stage of other lengths as many as hold as many tokens."""
    if run.micro_batch is None:
        return len(batch)
    return max(1, run.micro_batch * run.sequence_length // batch.tokens_BT.shape[1])


def _gradient(weight: Tensor) -> Tensor:
    return local(torch.zeros_like(weight) if weight.grad is None else weight.grad)


def over_ranks(stats: Stats, world: World) -> Stats:
    """What the routers did on all ranks, the same bits on each: biases that follow it never drift.

    Ranks of a tensor group route the same tokens, but not on every device to the last bit.
    """
    names = [field.name for field in dataclasses.fields(RouteStats)]

    def over(routed: RouteStats) -> RouteStats:
        routed = routed.over(world.ranks.data)
        return RouteStats(*(first(getattr(routed, name), world.ranks.tensor) for name in names))

    return tuple(tuple(over(routed) for routed in layer) for layer in stats)


def after_step(model: LM, stats: Stats, step: int) -> None:
    """Let the balance rules of every router see what the whole global batch did."""
    for block, layer_stats in zip(model.blocks(), stats, strict=True):
        for rules, routed in zip(balance_rules(block), layer_stats, strict=True):
            for rule in rules:
                rule.after_step(routed, step)
