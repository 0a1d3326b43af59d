"""`moebius bench optimizer`: each rule on the weights of a recipe, and its share of a step.

A rule moves matrices and experts, AdamW the rest, as the roles' default has it; `recipe` is the
recipe's own choice. The share is of the optimizer's time in a step: forward, backward, clipping and
itself. What AdamW takes for the rest is timed alone, so that a rule has its own share too. A rule
agrees if moving weights together equals moving them one at a time (Muon batches experts).
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
from moebius.model.weight import PRODUCT_ROLES, named_weights
from moebius.ops.native.memory import keep_freed_memory
from moebius.optim.optimizer import OptimConfig, Optimizer, clip_
from moebius.optim.roles import default_roles
from moebius.optim.rules import Rule, Slot
from moebius.optim.rules.adamw import AdamW
from moebius.train.passes import forward_backward
from moebius.train.precision import DTYPES
from moebius.train.run import Run
from moebius.train.session import Progress
from moebius.train.step import micro_rows

RECIPE, STEP, REST = "recipe", "forward, backward, clipping", "adamw, the rest alone"
# Weights that are moved one at a time, the smallest that a rule of matrices takes.
ALONE = 4


def bench_optimizer(
    run: Run, *, repeats: int = 10, progress: Progress | None = None
) -> dict[str, Any]:
    """Time every rule of the table; a dict of machine facts and `rows`."""
    keep_freed_memory()  # As a session does.
    loader, device = opened(run, progress)
    state, precision = begun(run, loader, device)
    dtype, model = DTYPES[precision], state.model
    batch = loader.batch(0).to(device)
    micro = batch.split(micro_rows(run, batch))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward_backward(model, micro, 0, dtype, run.recompute)
        clip_([w.grad for w in model.parameters() if w.grad is not None], run.optim.clip)

    step()
    weights = dict(named_weights(model))
    slots = [Slot(name, weight.role, weight.blocks) for name, weight in weights.items()]
    grads = {
        name: torch.zeros_like(w) if w.grad is None else w.grad.clone()
        for name, w in weights.items()
    }
    rest = [(s, weights[s.name].clone()) for s in slots if s.role not in PRODUCT_ROLES]
    adamw = Optimizer(_config(run, AdamW()), rest)
    alone = partial(_step, adamw, {slot.name: grads[slot.name] for slot, _ in rest}, run)
    works = {STEP: step, REST: alone}
    rows = {name: {"name": name, "agrees": None, "notes": []} for name in works}
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
        rows[name]["seconds"] = spent
        if rows[name]["agrees"]:
            whole = seconds[STEP] + spent
            rows[name] |= {"share": spent / whole, "own_share": (spent - seconds[REST]) / whole}
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
    rules = {name: construct(resolve(spec), {}) for name, spec in Rule.TABLE.items()}
    return {RECIPE: run.optim, **{name: _config(run, rule) for name, rule in rules.items()}}


def _config(run: Run, rule: Rule) -> OptimConfig:
    values = {"weight_decay": run.optim.weight_decay, "clip": run.optim.clip}
    roles = default_roles(matrix=rule)
    return OptimConfig(lr=run.optim.lr, schedule=run.optim.schedule, roles=roles, **values)


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
    matrices = [s for s in slots if s.role in PRODUCT_ROLES]
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
