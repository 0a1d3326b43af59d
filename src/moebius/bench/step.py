"""`moebius bench step`: whole training steps on real text, ours and others, in one run.

Ours with its learned router, the same with routing forced to be balanced, the dense twin, peers.
Each model lives in a process of its own; steps are interleaved and their medians taken, data
loading included. Before any ratio is printed, the ops in use are compared with their naive forms,
and a peer's model with ours, values and gradients.
"""

import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moebius.bench.agreement import agree
from moebius.bench.balanced import balanced_twin
from moebius.bench.child import Child
from moebius.bench.memory import WHY_NONE
from moebius.bench.ours import SPEC
from moebius.bench.peers import Peer, peer_named
from moebius.bench.settled import settled
from moebius.bench.timing import WARM_UP, machine
from moebius.config import to_json
from moebius.train.precision import DTYPES
from moebius.train.run import Run
from moebius.train.session import check, device_of, open_data
from moebius.train.twin import dense_twin

Progress = Callable[[str, int, int], None]
# Steps that are profiled for the split.
PROFILED = 3


@dataclasses.dataclass(frozen=True)
class Plan:
    """A row to be timed: what it is (ours, balanced, twin, or a peer's name) and its child."""

    kind: str
    name: str
    spec: str
    run_json: Any
    options: Any
    agrees: bool
    warm_up: int
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Timing:
    """What was measured of a row."""

    facts: dict[str, Any]
    steps: list[dict[str, Any]]
    after: dict[str, Any]
    split: dict[str, float]


def bench_step(
    run: Run,
    *,
    peers: Sequence[str] = (),
    forced_balanced: bool = True,
    repeats: int = 10,
    warm_up: int = WARM_UP,
    apart: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time a run beside its twins and peers; a dict of machine facts, errors, split and `rows`.

    `warm_up` steps of our own model are left out (others: WARM_UP), so that routing can settle
    first. `apart` times one model after the other, for those that do not fit in memory together.
    """
    check(run)
    prepare = [peer_named(name) for name in peers]
    device = device_of(run)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    _, loader = open_data(run, progress)
    run, errors, used = settled(run, loader, device)
    dtype = DTYPES[run.precision]
    agrees = agree(errors, dtype)
    with tempfile.TemporaryDirectory() as folder:
        batch = loader.batch(0)
        found = [
            each(run, batch, device, Path(folder) / name)
            for name, each in zip(peers, prepare, strict=True)
        ]
        plans = _plans(run, found, forced_balanced, agrees, warm_up)
        timings = _timings(plans, repeats, apart, device)
    facts = machine(device, dtype, run.matmul_flops)
    rows = [_row(plan, one, run, facts) for plan, one in zip(plans, timings, strict=True)]
    _ratios(plans, rows)
    return {
        **facts,
        "precision": run.precision,
        "in_use": used,
        "errors": errors,
        "expert_error": errors.get("experts"),
        "peer_errors": {peer.name: peer.errors for peer in found},
        "split": timings[0].split,
        "rows": rows,
    }


def _plans(
    run: Run, peers: Sequence[Peer], forced_balanced: bool, agrees: bool, warm_up: int
) -> list[Plan]:
    own = [("ours", run, warm_up)]
    twin = dense_twin(run)
    if twin.model != run.model:
        if forced_balanced:
            own.append(("balanced", balanced_twin(run), WARM_UP))
        own.append(("twin", twin, WARM_UP))
    plans = [
        Plan(kind, one.name, SPEC, to_json(one), None, agrees, steps) for kind, one, steps in own
    ]
    for peer in peers:
        # A peer is compared with our model, so it can only agree where ours is right.
        right = agrees and peer.agrees
        plans.append(
            Plan(
                "peer",
                f"{peer.name} {run.name}",
                peer.stepper,
                to_json(run),
                peer.options,
                right,
                WARM_UP,
                peer.notes,
            )
        )
    return plans


def _timings(
    plans: Sequence[Plan], repeats: int, apart: bool, device: torch.device
) -> list[Timing]:
    """Time all plans at once, in turns, or one by one."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    groups = [[plan] for plan in plans] if apart else [list(plans)]
    return [timing for group in groups for timing in _interleaved(group, repeats)]


def _interleaved(plans: Sequence[Plan], repeats: int) -> list[Timing]:
    with contextlib.ExitStack() as open_children:
        children = [
            open_children.enter_context(Child(plan.spec, plan.run_json, plan.options))
            for plan in plans
        ]
        for plan, child in zip(plans, children, strict=True):
            for _ in range(plan.warm_up):
                child.step()
        steps: list[list[dict[str, Any]]] = [[] for _ in plans]
        for _ in range(repeats):
            for child, own in zip(children, steps, strict=True):
                own.append(child.step())
        afters = [child.after() for child in children]
        splits = [
            child.split(PROFILED) if plan.kind == "ours" else {}
            for plan, child in zip(plans, children, strict=True)
        ]
    facts = [child.facts for child in children]
    return [Timing(*each) for each in zip(facts, steps, afters, splits, strict=True)]


def _row(plan: Plan, timing: Timing, run: Run, facts: dict[str, Any]) -> dict[str, Any]:
    def median(key: str) -> float:
        return statistics.median(step[key] for step in timing.steps)

    seconds = median("seconds")
    speed = run.tokens_per_step() / seconds
    flops = timing.facts.get("flops_per_token")
    peaks = [step["peak_memory_bytes"] for step in timing.steps]
    peak = None if None in peaks else max(peaks)
    notes = [*plan.notes, *timing.facts["notes"], *([WHY_NONE] if peak is None else [])]
    return {
        "name": plan.name,
        "kind": plan.kind,
        "tokens_per_second": speed,
        "mfu": None if flops is None else speed * flops / facts["matmul_flops"],
        "mfu_of_sheet": flops and facts["sheet_flops"] and speed * flops / facts["sheet_flops"],
        "seconds": seconds,
        "step_over_twin": None,
        "over_peer": None,
        "over_balanced": None,
        "memory_over_peer": None,
        "peak_memory_bytes": peak,
        "agrees": plan.agrees,
        "optimizer_share": median("optimizer_seconds") / seconds,
        "data_share": median("data_seconds") / seconds,
        "params_active_mean": timing.facts.get("params_active_mean"),
        "params_total": timing.facts["params_total"],
        "loss": timing.steps[-1]["loss"],
        **timing.after,
        "notes": notes,
    }


def _ratios(plans: Sequence[Plan], rows: Sequence[dict[str, Any]]) -> None:
    """Fill in the ratios, between rows that both agree; a peer computes our model's own numbers."""
    by_kind = {plan.kind: row for plan, row in zip(plans, rows, strict=True)}
    peers = [row for row in rows if row["kind"] == "peer"]
    twin, balanced = by_kind.get("twin"), by_kind.get("balanced")
    peer = max(peers, key=lambda row: row["tokens_per_second"], default=None)
    for row in rows:
        if twin and row["agrees"] and twin["agrees"]:
            row["step_over_twin"] = row["seconds"] / twin["seconds"]
    ours = by_kind["ours"]
    if balanced and ours["agrees"]:
        ours["over_balanced"] = balanced["seconds"] / ours["seconds"]
    if peer and ours["agrees"] and peer["agrees"]:
        for row in rows:
            if row["kind"] in ("ours", "balanced"):
                row["over_peer"] = peer["seconds"] / row["seconds"]
        if ours["peak_memory_bytes"] and peer["peak_memory_bytes"]:
            ours["memory_over_peer"] = ours["peak_memory_bytes"] / peer["peak_memory_bytes"]
