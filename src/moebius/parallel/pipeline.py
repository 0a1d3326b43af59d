"""Passing micro-batches through the stages of a pipeline, in the order of torch's schedules.

A stage is a module `(x, at=number of the micro-batch, passage=what else they need) -> x`; the last
one gives the micro-batch's part of the objective, which the others' gradients come from. Weights
that two stages use lie with one of them and are lent to the other for a step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from moebius.ops.linear import at_least_fp32
from moebius.ops.ranks import Cut
from moebius.ops.shard import Shard
from moebius.parallel.config import Pipe
from moebius.parallel.plan import local, part_of, put

_NAMES = {"1f1b": "1F1B", "interleaved": "Interleaved1F1B", "zbv": "ZBVZeroBubble"}


@dataclass(frozen=True)
class Lent:
    """A weight that lies with another stage, and on the ranks that borrow it a copy for a step."""

    weight: nn.Parameter
    shard: Shard
    cut: Cut
    copy: nn.Parameter | None
    everyone: dist.ProcessGroup

    @torch.no_grad()
    def give(self) -> None:
        """Before a step: all that the borrowers compute with. Collective."""
        whole = self.shard.whole(local(self.weight))
        if self.copy is not None:
            self.copy.data = part_of(whole, self.cut)

    @torch.no_grad()
    def take_back(self) -> None:
        """After it: the borrowers' gradients are added to those of the weight. Collective."""
        total = local(self.weight).new_zeros(self.shard.shape)
        if self.copy is not None:
            assert self.copy.grad is not None
            put(self.copy.grad, total, self.cut)
            self.copy.grad, self.copy.data = None, self.copy.data[:0].clone()
        dist.all_reduce(total, group=self.everyone)
        if self.shard.here:
            assert self.weight.grad is not None
            local(self.weight.grad).add_(self.shard.part(total))


@final
class Pipeline:
    """The stages of this rank, by their numbers, among all those of a line of ranks."""

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        pipe: Pipe,
        line: dist.ProcessGroup,
        lent: Sequence[Lent],
    ) -> None:
        self.pipe, self.line, self.lent = pipe, line, lent
        self._stages = stages
        self._words: list[str] | None = None
        # By what a schedule depends on: micro-batches, and the shape and dtype of hidden states.
        self._schedules: dict[tuple[int, torch.Size, torch.dtype], Any] = {}

    def step(self, num_micro: int, hidden: Tensor, passage: object) -> None:
        """Forward and backward of so many micro-batches, gradients added up. Collective.

        `hidden` is like the hidden states of one of them, on the device to compute on; it is not
        read. Every stage gets `passage`.
        """
        key = (num_micro, hidden.shape, hidden.dtype)
        if key not in self._schedules:
            self._schedules[key] = self._schedule(num_micro, hidden)
        for lent in self.lent:
            lent.give()
        index = torch.arange(num_micro)
        self._schedules[key].step(
            index, target=index, at=index, passage=passage, return_outputs=False
        )
        for lent in self.lent:
            lent.take_back()

    def told(self, words: list[str]) -> list[str]:
        """What the rank of the last stage said when it was asked first, on every rank."""
        if self._words is None:
            said = [words]
            last = self.pipe.rank_of(self.pipe.num_stages - 1)
            dist.broadcast_object_list(said, group=self.line, group_src=last)
            self._words = said[0]
        return self._words

    def _schedule(self, num_micro: int, hidden: Tensor) -> Any:
        between = torch.empty_like(hidden, device="meta").requires_grad_()
        loss = torch.empty((), dtype=at_least_fp32(hidden.dtype), device="meta").requires_grad_()
        number = torch.empty(1, dtype=torch.int64, device="meta")
        last = self.pipe.num_stages - 1
        stages = [
            PipelineStage(
                stage,
                i,
                self.pipe.num_stages,
                hidden.device,
                input_args=between if i else number,
                output_args=loss if i == last else between,
                group=self.line,
            )
            for i, stage in sorted(self._stages.items())
        ]
        kind: Any = get_schedule_class(_NAMES[self.pipe.schedule])
        of: Any = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
        # Losses are parts of one sum already: nothing is divided by the number of micro-batches.
        return kind(of, num_micro, loss_fn=_objective, scale_grads=False)


def _objective(output: Tensor, target: Tensor) -> Tensor:
    return output
