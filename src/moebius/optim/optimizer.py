"""The optimizer: every weight moved by the rule of its role, at the rate the schedule gives.

`Optimizer` takes named weights with their slots and refuses a role that no rule covers. It keeps
states only; the step is passed in, so continuing from saved states is exact to the last bit. Rates
and weight decays per role are multipliers of the run's own.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.config import nearest
from moebius.ops.ranks import Group, summed
from moebius.ops.shard import Fragment, Rows
from moebius.optim.members import Members
from moebius.optim.rules import Rule, Slot
from moebius.optim.schedules import Schedule

ROLES = ("embedding", "head", "matrix", "expert", "router", "norm", "bias", "scalar")


@dataclass(frozen=True)
class Role:
    """How weights of one role move; `lr` and `weight_decay` multiply those of the run."""

    rule: Rule
    lr: float = 1.0
    weight_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.lr < 0 or self.weight_decay < 0:
            raise ValueError(f"lr={self.lr}, weight_decay={self.weight_decay} must not be negative")


@dataclass(frozen=True)
class OptimConfig:
    """The run's peak rate, weight decay, clipping norm (None: off), schedule, and rule a role."""

    lr: float
    schedule: Schedule
    roles: Mapping[str, Role]
    weight_decay: float = 0.1
    clip: float | None = 1.0
    # The model width that `lr` was tuned at, if another; see `optim/transfer.py`.
    transfer_from_width: int | None = None

    def __post_init__(self) -> None:
        if self.lr < 0 or self.weight_decay < 0:
            raise ValueError(f"lr={self.lr}, weight_decay={self.weight_decay} must not be negative")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip={self.clip} must be above 0; write clip=none to switch it off")
        if self.transfer_from_width is not None and self.transfer_from_width < 1:
            width = self.transfer_from_width
            raise ValueError(f"transfer_from_width={width} must be at least 1 (or none)")
        for role in self.roles:
            if role not in ROLES:
                raise ValueError(f"unknown role {role!r}{nearest(role, ROLES)}")


class Optimizer:
    """Moves named weights. `weights` lists each weight with its slot, names being unique.

    Where weights are cut over ranks, each is this rank's part of one, and the ranks of `ranks`
    together hold every element once.

    Raises ValueError for a role without a rule, for weights below fp32 (a decay of 1e-4 would round
    away in bf16), and for weights whose shape the role's rule cannot take.
    """

    def __init__(
        self, config: OptimConfig, weights: Iterable[tuple[Slot, Tensor]], ranks: Group = None
    ) -> None:
        self.config, self.ranks = config, ranks
        by_role: dict[str, list[tuple[Slot, Tensor]]] = {}
        names: set[str] = set()
        for slot, param in weights:
            _check_weight(slot, param, names)
            names.add(slot.name)
            by_role.setdefault(slot.role, []).append((slot, param.detach()))
        for role, members in by_role.items():
            if role not in config.roles:
                listed = ", ".join(slot.name for slot, _ in members)
                raise ValueError(
                    f"no optimizer rule for role {role!r} of {listed}; add it to roles"
                )
        self.groups = {
            role: Members(config.roles[role].rule, members) for role, members in by_role.items()
        }

    def lr(self, step: int, total_steps: int, tokens_per_step: int) -> float:
        """The run's learning rate at `step`, counted from 0; a role multiplies it by its own lr."""
        return self.config.lr * self.config.schedule.factor(step, total_steps, tokens_per_step)

    def step(
        self,
        grads: Mapping[str, Tensor],
        *,
        step: int,
        total_steps: int,
        tokens_per_step: int,
        measure: bool = False,
    ) -> dict[str, Tensor]:
        """Move all weights in place, given a gradient for each name (already clipped).

        With `measure`, returns ||update|| / ||weight before it|| over each role's weights, at the
        cost of a copy of the role's weights; otherwise returns nothing.
        """
        names = {slot.name for group in self.groups.values() for slot in group.slots}
        _same_names("gradients", names, grads.keys())
        rate = self.lr(step, total_steps, tokens_per_step)
        ratios: dict[str, Tensor] = {}
        for name, group in self.groups.items():
            before = [param.clone() for param in group.params] if measure else []
            role = self.config.roles[name]
            group.update(
                [grads[slot.name] for slot in group.slots],
                lr=rate * role.lr,
                weight_decay=self.config.weight_decay * role.weight_decay,
                step=step + 1,
                total_steps=total_steps,
            )
            if measure:
                ratios[name] = _update_ratio(before, group.params, self.ranks)
        return ratios

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Within it the weights are those to evaluate, save and sample from.

        They are others than those in training for a rule that averages them (schedule_free), and
        come back bit for bit. Nothing may change a weight inside.
        """
        for group in self.groups.values():
            group.rule.to_evaluation(group.params, group.states)
        try:
            yield
        finally:
            for group in self.groups.values():
                group.rule.to_training(group.params, group.states)

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state tensor itself, not a copy, under the name `{weight}.{state}`.

        One that another rank keeps has no bytes here (it is on the meta device).
        """
        return {
            f"{slot.name}.{key}": tensor
            for group in self.groups.values()
            for slot, state in zip(group.slots, group.states, strict=True)
            for key, tensor in state.items()
        }

    def fragments(self, name: str) -> Iterator[Fragment]:
        """What this rank keeps of a state; of ranks that share weights, each element once."""
        for group in self.groups.values():
            if (found := group.fragments(name)) is not None:
                return found
        raise ValueError(f"there is no optimizer state {name}")

    def state_part(self, name: str, whole: Rows) -> Rows:
        """What this rank keeps of a whole state: it itself, or a copy of some rows."""
        for group in self.groups.values():
            if (found := group.state_part(name, whole)) is not None:
                return found
        raise ValueError(f"there is no optimizer state {name}")

    @torch.no_grad()
    def load_state_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Copy saved states in; ValueError, with nothing changed, unless all of them fit.

        The weights must be those that `evaluation_weights` gave when the states were saved, and
        become those in training.
        """
        own = self.state_tensors()
        _same_names("optimizer states", own.keys(), saved.keys())
        for name, tensor in own.items():
            kinds = [(tuple(item.shape), item.dtype) for item in (tensor, saved[name])]
            if kinds[0] != kinds[1]:
                raise ValueError(f"optimizer state {name} is {kinds[1]}, expected {kinds[0]}")
        for name, tensor in own.items():
            if not tensor.is_meta:
                tensor.copy_(saved[name])
        for group in self.groups.values():
            group.rule.to_training(group.params, group.states)


def global_norm(tensors: Sequence[Tensor], ranks: Group = None) -> Tensor:
    """The 2-norm over all elements of all tensors, in fp32 at least.

    Each rank of `ranks` gives the part of the tensors that lies on it, and gets the norm of all.
    """
    if not tensors:
        return torch.zeros(())
    norms = [
        torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
        for tensor in tensors
    ]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return norm if ranks is None else summed(norm.square(), ranks).sqrt()


@torch.no_grad()
def clip_(grads: Sequence[Tensor], max_norm: float | None, ranks: Group = None) -> Tensor:
    """Scale gradients in place to a global norm of at most `max_norm` (None: leave them).

    Returns the norm before. A norm that is not finite is left for the caller to see: it must skip
    the update, whose gradients are worthless either way.
    """
    norm = global_norm(grads, ranks)
    if max_norm is not None and grads:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(factor.to(grad.device))
    return norm


def _check_weight(slot: Slot, param: Tensor, names: set[str]) -> None:
    if slot.name in names:
        raise ValueError(f"two weights are called {slot.name}")
    if param.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{slot.name} is {param.dtype}; keep master weights in fp32 or fp64")
    if not param.is_contiguous():
        raise ValueError(f"{slot.name} is not contiguous; store it with .contiguous()")


def _same_names(what: str, expected: Iterable[str], given: Iterable[str]) -> None:
    missing = sorted(set(expected) - set(given))
    unexpected = sorted(set(given) - set(expected))
    if missing or unexpected:
        parts = [("missing", missing), ("unexpected", unexpected)]
        said = "; ".join(f"{label}: {', '.join(names)}" for label, names in parts if names)
        raise ValueError(f"{what} do not match the weights ({said})")


@torch.no_grad()
def _update_ratio(before: Sequence[Tensor], after: Sequence[Tensor], ranks: Group) -> Tensor:
    size = global_norm(before, ranks)
    for old, new in zip(before, after, strict=True):
        old.sub_(new)
    return global_norm(before, ranks) / size.clamp(min=torch.finfo(size.dtype).tiny)
