"""`moebius plan RECIPE --cluster`: all legal layouts of a cluster, simulated, the best first."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moebius.lab.planner.cost import Machine, Setting, Step, step_of
from moebius.lab.planner.hardware import PRICE, WHOLE_RUN, parse_cluster
from moebius.lab.planner.inference import decode, servings
from moebius.lab.planner.layout import Layout, legal_layouts
from moebius.lab.planner.memory import device_bytes
from moebius.lab.planner.shape import Shape, shape_of
from moebius.lab.planner.stages import Stage, stages_of
from moebius.train.run import Run

Report = dict[str, Any]
DAY = 86_400.0


def plan_training(
    run: Run,
    cluster_text: str,
    *,
    context: int | None = None,
    batch_tokens: int | None = None,
    price: float = PRICE,
    best: int = 10,
) -> Report:
    """The best layouts of a run on a cluster; ValueError where none is legal or none fits."""
    cluster = parse_cluster(cluster_text)
    shape = shape_of(run, _context(run, context))
    batch = _batch(run, shape.context, batch_tokens)
    machine = Machine(cluster, matmul=run.matmul_flops, whole=WHOLE_RUN)
    layouts = legal_layouts(shape, cluster, batch)
    stages: dict[tuple[int, int], tuple[Stage, ...]] = {}
    rows: list[Report] = []
    least = float("inf")
    for layout in layouts:
        found, needs = _best(shape, machine, layout, batch, stages)
        least = min(least, needs)
        if found is not None:
            rows.append(_row(shape, machine, layout, *found, batch, price))
    if not rows:
        raise ValueError(
            f"none of the {len(layouts)} layouts of {shape.name} fits: the leanest needs "
            f"{least / 1e9:,.0f} GB on a device, {cluster.device.name} has "
            f"{cluster.device.memory / 1e9:,.0f}; take more devices, a shorter --context or a "
            f"smaller batch"
        )
    rows.sort(key=lambda row: row["seconds"])
    return {
        **_head(shape, machine),
        "whole_run": machine.whole,
        "batch": batch,
        "tokens_per_step": batch * shape.context,
        "layouts": len(layouts),
        "not_fitting": len(layouts) - len(rows),
        "price": price,
        "best": rows[:best],
    }


def plan_inference(
    run: Run,
    cluster_text: str,
    *,
    context: int | None = None,
    batch: int | None = None,
    acceptance: float = 0.0,
    price: float = PRICE,
    best: int = 10,
) -> Report:
    """The best ways to decode with a run's model on a cluster; ValueError where none fits."""
    if not 0.0 <= acceptance < 1.0:
        raise ValueError(f"--acceptance must lie in 0..1, not {acceptance}")
    cluster = parse_cluster(cluster_text)
    shape = shape_of(run, _context(run, context))
    machine = Machine(cluster, matmul=run.matmul_flops)
    fitting, left = servings(shape, cluster, shape.context, batch, acceptance)
    if not fitting:
        raise ValueError(
            f"{shape.name} fits {cluster_text} in none of {left} layouts with "
            f"{batch or 1} sequences of {shape.context} tokens a device; take more or larger "
            f"devices, a shorter --context, or precision=fp8"
        )
    rows: list[Report] = []
    for serving in fitting:
        found = decode(shape, machine, serving)
        row = {"layout": f"ep={serving.ep} tp={serving.tp}", **dataclasses.asdict(serving)}
        rows.append({**row, **dataclasses.asdict(found), "dollars": found.dollars(price)})
    rows.sort(key=lambda row: -row["tokens_per_second"])
    head = {**_head(shape, machine), "layouts": len(fitting) + left, "not_fitting": left}
    return {**head, "price": price, "best": rows[:best]}


def _head(shape: Shape, machine: Machine) -> Report:
    cluster = machine.cluster
    return {
        "recipe": shape.name,
        "cluster": f"{cluster.nodes}x{cluster.per_node}x{cluster.device.name}",
        "devices": cluster.size,
        "measured": cluster.device.measured,
        "precision": "fp8" if shape.fp8 else "bf16",
        "context": shape.context,
    }


def _context(run: Run, context: int | None) -> int:
    context = run.sequence_length if context is None else context
    if context < 1:
        raise ValueError(f"context must be at least 1 token, not {context}")
    return context


def _batch(run: Run, context: int, tokens: int | None) -> int:
    """Sequences a step: as asked, or the recipe's tokens at the end of its ramp."""
    if tokens is None:
        last = run.batch_ramp[-1][1] if run.batch_ramp else run.batch
        tokens = last * run.sequence_length
    if tokens < context:
        raise ValueError(f"a batch of {tokens} tokens holds no sequence of {context}; ask for more")
    return tokens // context


def _best(
    shape: Shape,
    machine: Machine,
    layout: Layout,
    batch: int,
    stages: dict[tuple[int, int], tuple[Stage, ...]],
) -> tuple[tuple[Setting, Step, float] | None, float]:
    """The quickest setting of a layout that fits, and the bytes of the leanest one."""
    found: tuple[Setting, Step, float] | None = None
    least = float("inf")
    for setting in _settings(shape, layout, batch):
        cut = (layout.pp, setting.chunks)
        if cut not in stages:
            stages[cut] = stages_of(shape, *cut)
        needs = device_bytes(shape, layout, setting, batch, stages[cut])
        least = min(least, needs)
        if needs > machine.cluster.device.memory:
            continue
        step = step_of(shape, machine, layout, setting, batch, stages[cut])
        if found is None or step.seconds < found[1].seconds:
            found = (setting, step, needs)
    return found, least


def _settings(shape: Shape, layout: Layout, batch: int) -> Iterator[Setting]:
    own = batch // layout.data
    chunks = [1] if layout.pp == 1 else [v for v in (1, 2, 4, 8) if layout.pp * v <= shape.units]
    for micro in (1, 2, 4, 8, 16, 32, 64):
        if own % micro:
            break
        for v in chunks:
            # Interleaved schedules run micro-batches in rounds of as many as there are stages.
            if v > 1 and own // micro % layout.pp:
                continue
            for recompute in (False, True):
                for reshard in (False, True) if layout.sharded > 1 else (False,):
                    yield Setting(micro, v, recompute, reshard)


def _row(
    shape: Shape,
    machine: Machine,
    layout: Layout,
    setting: Setting,
    step: Step,
    needs: float,
    batch: int,
    price: float,
) -> Report:
    devices = machine.cluster.size
    rate = batch * shape.context / step.seconds
    hours = 1e12 / rate * devices / 3600.0
    peak = devices * machine.cluster.device.peak
    return {
        "layout": dataclasses.asdict(layout),
        "setting": dataclasses.asdict(setting),
        "memory_bytes": needs,
        **dataclasses.asdict(step),
        "mfu": shape.counts.flops_train * rate / peak,
        "tokens_per_second": rate,
        "tokens_per_day": rate * DAY,
        "device_hours_per_trillion": hours,
        "dollars_per_trillion": hours * price,
    }
