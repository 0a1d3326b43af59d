"""`moebius bench optimizer`: each rule on the weights of a recipe, and its share of a step.

A rule moves matrices and experts, AdamW the rest, as the roles' default has it; `recipe` is the
recipe's own choice. The share is of the rule's time in a step with the same forward and backward. A
rule agrees if moving weights together equals moving them one at a time (Muon batches experts).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moebius.bench.agreement import TOLERANCE, relative
from moebius.bench.memory import Memory
from moebius.bench.settled import begun, opened
from moebius.bench.timing import interleaved, machine
from moebius.config import construct, resolve
from moebius.model.weight import named_weights
from moebius.optim.optimizer import OptimConfig, Optimizer
from moebius.optim.roles import default_roles
from moebius.optim.rules import Rule, Slot
from moebius.train.passes import forward_backward
from moebius.train.precision import DTYPES
from moebius.train.run import Run
from moebius.train.session import Progress
from moebius.train.step import micro_rows

RECIPE, STEP = "recipe", "forward and backward"
# Weights that are moved one at a time, the smallest that a rule of matrices takes.
ALONE = 4


def bench_optimizer(
    run: Run, *, repeats: int = 10, progress: Progress | None = None
) -> dict[str, Any]:
    """Time every rule of the table; a dict of machine facts and `rows`."""
    loader, device = opened(run, progress)
    state, precision = begun(run, loader, device)
    dtype, model = DTYPES[precision], state.model
    batch = loader.batch(0).to(device)
    micro = batch.split(micro_rows(run, batch))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward_backward(model, micro, 0, dtype, run.recompute)

    step()
    weights = dict(named_weights(model))
    slots = [Slot(name, weight.role, weight.blocks) for name, weight in weights.items()]
    grads = {
        name: torch.zeros_like(w) if w.grad is None else w.grad.clone()
        for name, w in weights.items()
    }
    works, rows = {STEP: step}, {STEP: {"name": STEP, "agrees": None, "notes": []}}
    for name, config in _configs(run).items():
        try:
            optimizer = Optimizer(config, [(s, weights[s.name].clone()) for s in slots])
        except ValueError as refused:
            rows[name] = {"name": name, "agrees": None, "notes": [f"refused: {refused}"]}
            continue
        works[name] = partial(_step, optimizer, grads, run)
        peak = _peak(optimizer, works[name], device)
        found = _alone_error(config, slots, weights, grads, run)
        agrees = found <= TOLERANCE[torch.bfloat16]
        rows[name] = {"name": name, "error": found, "agrees": agrees, "notes": []}
        rows[name]["peak_memory_bytes"] = peak
    seconds = interleaved(works, device, repeats)
    for name, spent in seconds.items():
        share = None if name == STEP else spent / (spent + seconds[STEP])
        agreed = rows[name]["agrees"] is not False
        rows[name] |= {"seconds": spent, "share": share if agreed else None}
    return {**machine(device, dtype, run.matmul_flops), "rows": list(rows.values())}


def _peak(optimizer: Optimizer, step: Callable[[], None], device: torch.device) -> int | None:
    """The states, and what a step needs above them."""
    states = sum(x.numel() * x.element_size() for x in optimizer.state_tensors().values())
    step()
    memory = Memory(device)
    memory.reset()
    step()
    scratch = memory.peak()
    return None if scratch is None else states + scratch


def _configs(run: Run) -> dict[str, OptimConfig]:
    """The optimizer of each rule: its class by default, AdamW beside it."""
    found = {RECIPE: run.optim}
    for name, spec in Rule.TABLE.items():
        rule = construct(resolve(spec), {})
        roles = default_roles(matrix=rule)
        values = {"roles": roles, "weight_decay": run.optim.weight_decay, "clip": run.optim.clip}
        found[name] = OptimConfig(lr=run.optim.lr, schedule=run.optim.schedule, **values)
    return found


def _step(optimizer: Optimizer, grads: Mapping[str, Tensor], run: Run) -> None:
    tokens = run.tokens_per_step()
    optimizer.step(grads, step=run.steps // 2, total_steps=run.steps, tokens_per_step=tokens)


def _alone_error(
    config: OptimConfig,
    slots: list[Slot],
    weights: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    run: Run,
) -> float:
    """How far a few weights moved together are from the same moved one at a time."""
    matrices = [s for s in slots if s.role in ("matrix", "expert")]
    few = sorted(matrices, key=lambda s: weights[s.name].numel())[:ALONE]
    together = _moved(config, few, weights, grads, run)
    errors = [0.0]
    for slot in few:
        (alone,) = _moved(config, [slot], weights, grads, run)
        errors.append(relative(alone, together[few.index(slot)]))
    return max(errors)


def _moved(
    config: OptimConfig,
    slots: list[Slot],
    weights: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    run: Run,
) -> list[Tensor]:
    """The updates of some weights by one step of an optimizer of theirs alone."""
    before = [weights[slot.name].detach().clone() for slot in slots]
    after = [x.clone() for x in before]
    optimizer = Optimizer(config, list(zip(slots, after, strict=True)))
    _step(optimizer, {slot.name: grads[slot.name].clone() for slot in slots}, run)
    return [new - old for new, old in zip(after, before, strict=True)]
