"""Forward and backward over the micro-batches of a step, here or through a pipeline of ranks.

Every loss is a sum divided once by the global count of targets, so micro-batches simply add up.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moebius.data.loader import Batch
from moebius.model.context import Context
from moebius.model.ffn import RouteStats
from moebius.model.lm import LM
from moebius.model.stage import Micro, Passage
from moebius.ops.linear import at_least_fp32
from moebius.ops.ranks import Group, size_of
from moebius.ops.sequences import places
from moebius.parallel.pipeline import Pipeline
from moebius.train.state import TrainState

Stats = tuple[tuple[RouteStats, ...], ...]
# The sum of the cross-entropies, the sums of the ends, and what routers did.
Passed = tuple[Tensor, dict[str, Tensor], Stats]


def passes(
    state: TrainState, micro_batches: Sequence[Batch], dtype: torch.dtype, recompute: bool
) -> Passed:
    """Accumulate the gradients of micro-batches at the state's step, as its layout has them done.

    Ranks that hold other layers each say what theirs did: it adds up to what the model did.
    """
    sharers, pipeline = state.weights.world.ranks.context, state.weights.pipeline
    step = state.step
    if pipeline is None:
        return forward_backward(state.model, micro_batches, step, dtype, recompute, sharers)
    passage = Passage(
        len(micro_batches),
        lambda number: micro_of(micro_batches[number], step, sharers),
        dtype,
        recompute,
    )
    batch, length = micro_batches[0].tokens_BT.shape
    shape = (batch, length // size_of(sharers), state.model.config.width)
    return _through(pipeline, state.model, passage, shape, micro_batches[0].tokens_BT.device)


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


def micro_of(batch: Batch, step: int, sharers: Group = None) -> Micro:
    """What a model is given of a micro-batch: whole sequences, or this rank's tokens of them where
    `sharers` have the others."""
    ctx, tokens_BT, targets_BT = context_of(batch, step), batch.tokens_BT, batch.targets_BT
    if sharers is None:
        return Micro(tokens_BT, targets_BT, ctx)
    place_T = places(tokens_BT.shape[1], sharers, tokens_BT.device)
    return Micro(tokens_BT[:, place_T], targets_BT[:, place_T], ctx.at(place_T))


def forward_backward(
    model: LM,
    micro_batches: Sequence[Batch],
    step: int,
    dtype: torch.dtype,
    recompute: bool,
    sharers: Group = None,
) -> Passed:
    """The passes of a model whose layers are all here."""
    total: Tensor | None = None
    sums: dict[str, Tensor] = {}
    stats: Stats = ()
    for batch in micro_batches:
        micro = micro_of(batch, step, sharers)
        given = (micro.tokens_BT, micro.targets_BT, micro.ctx)
        loss = model.loss(*given, dtype=dtype, recompute=recompute)
        (loss.total / micro.ctx.num_targets).backward()
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


def _through(
    pipeline: Pipeline,
    model: LM,
    passage: Passage,
    shape: tuple[int, int, int],
    device: torch.device,
) -> Passed:
    """Of what other ranks of the line hold, routers did nothing here, and losses are 0.

    `shape` is that of the hidden states_BTD of a micro-batch.
    """
    pipeline.step(passage.num_micros, shape, passage.dtype, device, passage)
    total = torch.zeros((), dtype=at_least_fp32(passage.dtype), device=device)
    sums = dict.fromkeys(pipeline.told(sorted(passage.sums.get(0, {}))), total.double())
    for i in sorted(passage.totals):
        total = total + passage.totals[i]
        sums = {name: value + passage.sums[i][name] for name, value in sums.items()}
    stats = tuple(passage.layer(model, i) for i in range(len(model.layers)))
    return total, sums, stats
