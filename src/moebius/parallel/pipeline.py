"""Passing micro-batches through the stages of a pipeline, in the order of torch's schedules.

A stage is a module `(x, passage=what else it needs) -> x`, called for one micro-batch after the
other; the last one gives the micro-batch's part of the objective, which the others' gradients come
from. Weights that two stages use lie with one of them and are lent to the other for a step.
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
        # The schedule in use, which keeps what it receives, and what it was made for.
        self._made_for: tuple[Any, ...] | None = None
        self._schedule: Any = None

    def step(
        self,
        num_micros: int,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        passage: object,
    ) -> None:
        """Forward and backward of so many micro-batches, gradients added up. Collective.

        Hidden states of each are of that shape and dtype. Every stage gets `passage`. Raises what a
        stage raised.
        """
        if self._made_for != (num_micros, shape, dtype, device):
            self._schedule = None
            self._schedule = self._new(
                num_micros, torch.empty(shape, dtype=dtype, device="meta"), device
            )
            self._made_for = (num_micros, shape, dtype, device)
        for lent in self.lent:
            lent.give()
        index = torch.arange(num_micros)
        try:
            self._schedule.step(index, target=index, passage=passage, return_outputs=False)
        except RuntimeError as error:
            raise _first(error) from None
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

    def _new(self, num_micros: int, hidden: Tensor, device: torch.device) -> Any:
        between = hidden.requires_grad_()
        loss = torch.empty((), dtype=at_least_fp32(hidden.dtype), device="meta").requires_grad_()
        number = torch.empty(1, dtype=torch.int64, device="meta")
        last = self.pipe.num_stages - 1
        stages = [
            PipelineStage(
                stage,
                i,
                self.pipe.num_stages,
                device,
                input_args=between if i else number,
                output_args=loss if i == last else between,
                group=self.line,
            )
            for i, stage in sorted(self._stages.items())
        ]
        kind: Any = get_schedule_class(_NAMES[self.pipe.schedule])
        of: Any = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
        # Losses are parts of one sum already: nothing is divided by the number of micro-batches.
        return kind(of, num_micros, loss_fn=_objective, scale_grads=False)


def _first(error: BaseException) -> BaseException:
    """What torch wrapped, with all that a stage was given, into errors of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _objective(output: Tensor, target: Tensor) -> Tensor:
    return output
