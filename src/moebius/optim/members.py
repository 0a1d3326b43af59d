"""The weights of one role with their states, moved together by the role's rule.

Where ranks hold rows of a matrix, a rule that looks at whole matrices (Muon, SOAP) needs them put
together: each such matrix has an owner, the only rank that keeps its state and computes its update
(as Moonlight's distributed Muon, arXiv 2502.16982, 2.3); all others move by what lies on the rank.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.ops.shard import Fragment, Rows, Shard
from moebius.optim.rules import Rule, Slot, State


class Members:
    """`members` are the weights, or this rank's parts of them, in the order they were given."""

    def __init__(self, rule: Rule, members: Sequence[tuple[Slot, Tensor]]) -> None:
        self.rule = rule
        self.slots = [slot for slot, _ in members]
        self.params = [param for _, param in members]
        self._places = {slot.name: i for i, slot in enumerate(self.slots)}
        # By place: the shard of a matrix that has to be put together, and its owner.
        self._apart: dict[int, Shard] = {
            i: slot.shard
            for i, slot in enumerate(self.slots)
            if rule.MATRICES and slot.shard is not None and slot.shard.cuts_matrices
        }
        self._owner = {i: n % len(shard.spans) for n, (i, shard) in enumerate(self._apart.items())}
        kept = [self._kept(i, param) for i, param in enumerate(self.params)]
        self.states: list[State] = rule.init(self.slots, kept)
        for i, (slot, state) in enumerate(zip(self.slots, self.states, strict=True)):
            # What is one number for all rows, every rank has.
            odd = [key for key, x in state.items() if x.ndim and len(x) != len(self.params[i])]
            if slot.shard is not None and i not in self._apart and odd:
                raise ValueError(
                    f"{slot.name} is cut over ranks, but its state {odd[0]} has not a row for each "
                    "of its rows; give its role another optimizer rule"
                )

    def _kept(self, i: int, param: Tensor) -> Tensor:
        """Like that of which this rank keeps the state; another rank's has no bytes."""
        if i not in self._apart:
            return param
        place = param.device if self._owns(i) else "meta"
        return torch.empty(self._apart[i].shape, dtype=param.dtype, device=place)

    def _owns(self, i: int) -> bool:
        if i not in self._apart:
            return True
        return self._apart[i].here and self._owner[i] == self._apart[i].rank

    def update(
        self,
        grads: Sequence[Tensor],
        *,
        lr: float,
        weight_decay: float,
        step: int,
        total_steps: int,
    ) -> None:
        """Move all weights and states in place."""
        params, grads = list(self.params), list(grads)
        apart = {i: shard for i, shard in self._apart.items() if shard.here}
        for i, shard in apart.items():
            params[i], grads[i] = shard.gathered(params[i]), shard.gathered(grads[i])
        mine = [i for i in range(len(params)) if self._owns(i)]
        self.rule.update(
            [self.slots[i] for i in mine],
            [params[i] for i in mine],
            [grads[i] for i in mine],
            [self.states[i] for i in mine],
            lr=lr,
            weight_decay=weight_decay,
            step=step,
            total_steps=total_steps,
        )
        for i, shard in apart.items():
            dist.broadcast(params[i], group=shard.group, group_src=self._owner[i])
            self.params[i].copy_(shard.part(params[i]))

    def fragments(self, name: str) -> Iterator[Fragment] | None:
        """What this rank keeps of a state `{weight}.{state}`; None where it is of another role."""
        found = self._find(name)
        if found is None:
            return None
        i, state = found
        shard = self.slots[i].shard
        if shard is None or i in self._apart:
            mine = self._owns(i)
        elif state.ndim:
            return shard.fragments(state)
        else:
            mine = shard.here and shard.rank == 0
        return iter([Fragment(state, tuple(state.shape))] if mine else [])

    def state_part(self, name: str, whole: Rows) -> Rows | None:
        """What this rank keeps of a whole state, without bytes where that is nothing; None where
        the state is of another role.
        """
        found = self._find(name)
        if found is None:
            return None
        i, state = found
        shard = self.slots[i].shard
        if state.is_meta:
            return torch.empty(whole.shape, dtype=whole.dtype, device="meta")
        if shard is None or i in self._apart or not whole.shape:
            return whole
        return shard.part(whole)

    def _find(self, name: str) -> tuple[int, Tensor] | None:
        weight, _, key = name.rpartition(".")
        i = self._places.get(weight)
        return None if i is None or key not in self.states[i] else (i, self.states[i][key])
