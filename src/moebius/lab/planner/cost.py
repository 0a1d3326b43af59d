"""One training step of a layout, simulated from rates, bytes and links.

Products run at their kernels' rate or as fast as their weights are read; between them every value
is read and written once forward, twice backward. Tensor and context collectives stand in the way;
expert exchange does unless the block (ScMoE) or the schedule (DualPipe) runs beside it; FSDP's
hides under the first forward and the last backward. What hides still takes multiprocessors.
"""

import dataclasses

from moebius.lab.planner.hardware import (
    ALL_TO_ALL,
    BACKGROUND,
    FP8_BYTES,
    HALF_TILE,
    NEWEST,
    Cluster,
    Kernels,
)
from moebius.lab.planner.layout import Layout, spread
from moebius.lab.planner.shape import Part, Route, Shape
from moebius.lab.planner.stages import Schedule, Stage, idle


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a layout leaves open: sequences at once, chunks of a rank, what is kept."""

    micro_batch: int = 1
    chunks: int = 1
    recompute: bool = False
    # Gather weights for every micro-batch (True), or once a step.
    reshard: bool = False
    schedule: Schedule = "interleaved"


@dataclasses.dataclass(frozen=True)
class Pass:
    """Seconds of a micro-batch on a part or rank: computing, waiting on links, beside compute."""

    compute: float = 0.0
    exposed: float = 0.0
    hidden: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it; what hides slows what it hides under."""
        return self.compute + self.exposed + BACKGROUND * self.hidden

    def plus(self, other: "Pass", times: float = 1.0) -> "Pass":
        """The sum with a multiple of another."""
        return Pass(
            self.compute + times * other.compute,
            self.exposed + times * other.exposed,
            self.hidden + times * other.hidden,
        )


@dataclasses.dataclass(frozen=True)
class Step:
    """A step's seconds, and the part of them spent on each thing by the slowest rank; `whole` is
    what a run of a whole model takes beyond its kernels and links."""

    seconds: float
    compute: float
    exposed: float
    idle: float
    data: float
    optimizer: float
    whole: float


@dataclasses.dataclass(frozen=True)
class Machine:
    """A cluster with the kernels of a time; a stated rate of products scales theirs. `whole`: how
    many times the seconds of kernels and links a training step takes."""

    cluster: Cluster
    time: str = NEWEST
    matmul: float | None = None
    whole: float = 1.0

    @property
    def kernels(self) -> Kernels:
        """The rates in use."""
        kernels = self.cluster.device.kernels[self.time]
        if self.matmul is None:
            return kernels
        ratio = self.matmul / kernels.matmul
        grouped = kernels.grouped * ratio
        return dataclasses.replace(kernels, matmul=self.matmul, grouped=grouped)


def step_of(
    shape: Shape,
    machine: Machine,
    layout: Layout,
    setting: Setting,
    batch: int,
    stages: tuple[Stage, ...],
) -> Step:
    """The step of a batch of so many sequences: that of the pipeline's slowest rank."""
    micro = batch // (layout.data * setting.micro_batch)
    tokens = setting.micro_batch * shape.context / layout.cp
    times = {
        part: passes(part, shape, machine, layout, setting, tokens)
        for stage in stages
        for part, _ in stage.parts
    }
    steps = [_step(stage, times, shape, machine, layout, setting, micro) for stage in stages]
    return max(steps, key=lambda step: step.seconds)


def _step(
    stage: Stage,
    times: dict[Part, tuple[Pass, Pass]],
    shape: Shape,
    machine: Machine,
    layout: Layout,
    setting: Setting,
    micro: int,
) -> Step:
    sent = _sent(shape, machine.cluster, layout, setting)
    forward = backward = Pass(hidden=setting.chunks * sent)
    for part, count in stage.parts:
        forward = forward.plus(times[part][0], count)
        backward = backward.plus(times[part][1], count)
    dense = sum(part.dense_params * count for part, count in stage.parts) / layout.tp
    experts = sum(part.expert_params * count for part, count in stage.parts) / layout.ep
    gather, scatter, reduce = _data_seconds(dense, experts, machine.cluster, layout)
    units = sum(count for _, count in stage.parts)
    f, b = forward.seconds, backward.seconds
    if setting.reshard:
        # Each micro-batch gathers forward and backward, and scatters.
        f_extra = _beside(gather, f, units)
        b_extra = _beside(gather + scatter, b, units)
        f, b, data = f + f_extra, b + b_extra, micro * (f_extra + b_extra)
    else:
        data = _beside(gather, f, units) + _beside(scatter, b, units)
    # While the pipeline fills and drains nothing hides what a stage waits to receive.
    waits = idle(setting.schedule, layout.pp, setting.chunks, f, b) + 2 * (layout.pp - 1) * sent
    optimizer = _optimizer_bytes(stage, layout) / machine.cluster.device.bandwidth
    once = 0.0 if setting.reshard else data
    seconds = micro * (f + b) + waits + once + reduce + optimizer
    compute = micro * (forward.compute + backward.compute)
    exposed = micro * (forward.exposed + backward.exposed)
    beyond = (machine.whole - 1.0) * seconds
    return Step(seconds + beyond, compute, exposed, waits, data + reduce, optimizer, beyond)


def _beside(link: float, room: float, units: int) -> float:
    """Seconds that a transfer adds to what it runs beside; that of one unit has nothing to."""
    exposed = max(link - room, link / units)
    return exposed + BACKGROUND * (link - exposed)


def _sent(shape: Shape, cluster: Cluster, layout: Layout, setting: Setting) -> float:
    """Seconds in which a rank sends a chunk's output on."""
    if layout.pp == 1:
        return 0.0
    tokens = setting.micro_batch * shape.context / (layout.cp * layout.tp)
    stride = layout.world // layout.pp
    link = spread(cluster, stride, layout.pp)
    return 2.0 * shape.width * tokens / link


def _optimizer_bytes(stage: Stage, layout: Layout) -> float:
    """Bytes of an update: gradient read, master and states read and written, bf16 written."""
    dense = sum((14 * p.dense_params + 2 * p.dense_states) * count for p, count in stage.parts)
    experts = sum((14 * p.expert_params + 2 * p.expert_states) * count for p, count in stage.parts)
    return (dense / layout.tp + experts) / layout.sharded


def _data_seconds(
    dense: float, experts: float, cluster: Cluster, layout: Layout
) -> tuple[float, float, float]:
    """Gathering bf16 weights, scattering fp32 gradients, and summing them over replicas."""
    ranks, stride = layout.sharded, layout.tp
    link = spread(cluster, stride, ranks)
    of_experts = ranks // layout.ep
    share = (ranks - 1) / ranks * dense + (of_experts - 1) / of_experts * experts
    gather, scatter = 2.0 * share / link, 4.0 * share / link
    copies = layout.dp_replicate
    own = dense / ranks + experts / of_experts
    wide = spread(cluster, stride * ranks, copies)
    return gather, scatter, 2.0 * (copies - 1) / copies * 4.0 * own / wide


def passes(
    part: Part, shape: Shape, machine: Machine, layout: Layout, setting: Setting, tokens: float
) -> tuple[Pass, Pass]:
    """Forward and backward of a part for a micro-batch of so many tokens in a sequence chunk."""
    kernels, device = machine.kernels, machine.cluster.device
    own = tokens / layout.tp
    products = _products(part, kernels, device.bandwidth, layout, own, shape.fp8)
    mixing = part.mixing * own
    # Adding to the stream reads two and writes one; its gradient does, and the norm's once more.
    stream = 2.0 * shape.width * part.writes
    values = (part.kept + 3 * stream + (part.quantised_forward if shape.fp8 else 0.0)) * own
    backward_values = 2 * part.kept + 5 * stream
    gradients = (backward_values + (part.quantised_backward if shape.fp8 else 0.0)) * own
    if part.name == "head":
        # Logits of the loss in fp32: written, read, and their gradient written and read.
        values += 16.0 * shape.vocab * own
    params = part.dense_params / layout.tp + part.expert_params / layout.ep
    accumulate = 10.0 * params / device.bandwidth
    forward = products + mixing / kernels.attention + values / device.bandwidth
    backward = 2 * products + 2.5 * mixing / kernels.attention_backward
    backward += gradients / device.bandwidth + accumulate
    links = part.gathered * _gathers(shape.width, tokens, machine.cluster, layout)
    links += _chunks(part, tokens, machine.cluster, layout)
    exchange = sum(
        exchange_seconds(route, shape, machine.cluster, layout, own) for route in part.routes
    )
    there = _pass(part, forward, links, exchange, setting, products)
    back = _pass(part, backward, links, exchange, setting, 2 * products)
    return there, back.plus(there) if setting.recompute and part.name == "unit" else back


def _pass(
    part: Part,
    compute: float,
    links: float,
    exchange: float,
    setting: Setting,
    products: float,
) -> Pass:
    if setting.schedule == "dualpipe":
        room = compute
    elif part.shortcut:
        # All but the first mixer and the experts run beside the exchange.
        beside = 1.0 - (part.of_mixers / 2 + part.grouped) / max(1.0, part.weight - part.mixing)
        room = products * beside
    else:
        room = 0.0
    hidden = min(exchange, room)
    return Pass(compute, links + exchange - hidden, hidden)


def _products(
    part: Part, kernels: Kernels, bandwidth: float, layout: Layout, own: float, fp8: bool
) -> float:
    rate = kernels.matmul_fp8 if fp8 else kernels.matmul
    dense = (part.of_mixers + part.dense) * own / rate + part.plain * own / kernels.matmul
    dense = max(dense, 2.0 * part.dense_params / layout.tp / bandwidth) if dense else 0.0
    if not part.grouped:
        return dense
    rows = own * layout.ep * sum(r.per_token for r in part.routes)
    rows /= sum(route.experts for route in part.routes)
    padded = part.grouped * own * (rows + HALF_TILE) / rows
    grouped = padded / (kernels.grouped_fp8 if fp8 else kernels.grouped)
    return dense + max(grouped, 2.0 * part.expert_params / layout.ep / bandwidth)


def _gathers(width: int, tokens: float, cluster: Cluster, layout: Layout) -> float:
    """A gather before and a scatter after a sub-layer, over the tensor-parallel ranks."""
    share = (layout.tp - 1) / layout.tp
    return 2.0 * 2.0 * width * tokens * share / spread(cluster, 1, layout.tp)


def _chunks(part: Part, tokens: float, cluster: Cluster, layout: Layout) -> float:
    """Gathering the other chunks' keys and values (their gradients back: as much)."""
    held = part.cache * tokens / layout.tp
    return held * (layout.cp - 1) / spread(cluster, layout.tp, layout.cp)


def exchange_seconds(
    route: Route, shape: Shape, cluster: Cluster, layout: Layout, own: float
) -> float:
    """Dispatch and combine of a mixture: to every node that holds an expert of the token."""
    if layout.ep == 1:
        return 0.0
    device, ep = cluster.device, layout.ep
    per_token = (FP8_BYTES if shape.fp8 else 2.0) * shape.width + 2.0 * shape.width
    nodes = -(-layout.tp * ep // cluster.per_node)
    if nodes == 1:
        reached = ep * (1.0 - (1.0 - 1.0 / ep) ** route.per_token) * (ep - 1) / ep
        return own * per_token * reached / device.nvlink
    reached = nodes * (1.0 - (1.0 - 1.0 / nodes) ** route.per_token)
    if route.groups is not None:
        reached = min(reached, float(route.groups))
    known = [size for size in ALL_TO_ALL if size <= ep] or [min(ALL_TO_ALL)]
    return own * per_token * reached / ALL_TO_ALL[max(known)]
