"""Bytes on the fullest device of a layout: states as they are sharded, activations in flight.

Masters, gradients and optimizer states are those of `moebius.lab.memory`, divided over ranks;
activations are its estimate of what the backward keeps. Buffers of libraries are left out: a
device's stated memory is in units of 10^9, which leaves them some 7%.
"""

from moebius.lab.planner.cost import Setting
from moebius.lab.planner.layout import Layout
from moebius.lab.planner.shape import Part, Shape
from moebius.lab.planner.stages import Stage, in_flight
from moebius.ops.loss.chunked import CHUNK


def device_bytes(
    shape: Shape, layout: Layout, setting: Setting, batch: int, stages: tuple[Stage, ...]
) -> float:
    """Bytes that the fullest rank holds at its peak."""
    micro = batch // (layout.data * setting.micro_batch)
    return max(_stage(stage, shape, layout, setting, micro) for stage in stages)


def _stage(stage: Stage, shape: Shape, layout: Layout, setting: Setting, micro: int) -> float:
    tokens = setting.micro_batch * shape.context / (layout.cp * layout.tp)
    size = {part: _weights(part, layout) for part, _ in stage.parts}
    whole = sum(size[part] * count for part, count in stage.parts)
    largest = max(size.values())
    masters = sum(_masters(part, layout) * count for part, count in stage.parts)
    copies = 2 if setting.schedule == "dualpipe" else 1
    if setting.reshard:
        # Sharded gradients; weights and whole gradients of the unit at work and of the next.
        states = masters + _gradients(stage, layout) + 2 * (2 + 4) * largest
    else:
        states = masters + copies * (2 + 4) * whole
    held = in_flight(setting.schedule, layout.pp, setting.chunks, stage.rank, micro)
    kept = sum(
        (2.0 * shape.width if setting.recompute and part.name == "unit" else part.kept) * count
        for part, count in stage.parts
    )
    at_work = max(part.kept for part, _ in stage.parts) if setting.recompute else 0.0
    loss = any(part.name == "head" for part, _ in stage.parts)
    logits = 2 * 4.0 * min(CHUNK, tokens) * shape.vocab / layout.tp if loss else 0.0
    return states + tokens * (held * kept + at_work) + logits


def _weights(part: Part, layout: Layout) -> float:
    """Parameters of a part on a rank, once gathered."""
    return part.dense_params / layout.tp + part.expert_params / layout.ep


def _masters(part: Part, layout: Layout) -> float:
    """Bytes of fp32 masters and optimizer states; experts are not split by tensor parallelism."""
    dense = 4.0 * part.dense_params + part.dense_states
    experts = 4.0 * part.expert_params + part.expert_states
    return dense / (layout.sharded * layout.tp) + experts / layout.sharded


def _gradients(stage: Stage, layout: Layout) -> float:
    dense = sum(4.0 * part.dense_params * count for part, count in stage.parts)
    experts = sum(4.0 * part.expert_params * count for part, count in stage.parts)
    return dense / (layout.sharded * layout.tp) + experts / layout.sharded
