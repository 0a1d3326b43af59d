"""Decoding on a cluster: seconds of a step, tokens per second and device, dollars per million.

A step runs every sequence's tokens (drafts included) once through the model: attention reads the
cache, products their weights, experts exchange tokens by low-latency kernels. In a ScMoE block the
exchange runs beside the dense half (LongCat-Flash 6.1.1, SBO); elsewhere it stands in the way.
Mixers stay in bf16; with precision=fp8 dense products and experts are in fp8.
"""

import dataclasses
from collections.abc import Iterator

import torch

from moebius.lab.planner.cost import Machine
from moebius.lab.planner.hardware import (
    ALL_REDUCE,
    DECODE_ATTENTION,
    DECODE_CACHE,
    DECODE_GROUPED,
    FP8_BYTES,
    HOPPER,
    LOW_LATENCY,
    NEWEST,
    PRICE,
    Cluster,
)
from moebius.lab.planner.shape import Part, Shape
from moebius.model.mixers import Mixer
from moebius.model.mixers.mla import MLA


@dataclasses.dataclass(frozen=True)
class Serving:
    """`batch` sequences a device at `context` tokens; `tokens` of each a step, drafts included."""

    batch: float
    context: int
    ep: int = 1
    tp: int = 1
    tokens: int = 1
    # The chance that a draft is accepted, given those before it were.
    acceptance: float = 0.0

    @property
    def accepted(self) -> float:
        """Tokens a sequence gains in a step."""
        return sum(self.acceptance**i for i in range(self.tokens))


@dataclasses.dataclass(frozen=True)
class Layer:
    """Microseconds of the modules of a unit, and of the unit with what overlaps."""

    attention: float
    dense: float
    dispatch: float
    experts: float
    combine: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What serving costs. Rates are per device."""

    seconds: float
    per_token: float
    tokens_per_second: float
    memory: float

    def dollars(self, price: float = PRICE) -> float:
        """Per million output tokens."""
        return price / 3600.0 / self.tokens_per_second * 1e6


def decode(shape: Shape, machine: Machine, serving: Serving) -> Decoded:
    """A decoding step and what follows from it."""
    layers = {part: layer_of(part, shape, machine, serving) for part in dict.fromkeys(shape.parts)}
    seconds = sum(layers[part].seconds for part in shape.parts)
    gained = serving.accepted
    rate = serving.batch * gained / seconds / serving.tp
    return Decoded(seconds, seconds / gained, rate, serving_bytes(shape, serving))


def layer_of(part: Part, shape: Shape, machine: Machine, serving: Serving) -> Layer:
    """The modules of a part, for the sequences of one device (of a group with tensor degrees)."""
    kernels, device = machine.kernels, machine.cluster.device
    tokens, tp = serving.batch * serving.tokens, serving.tp
    size = 1.0 if shape.fp8 else 2.0
    rate = kernels.matmul_fp8 if shape.fp8 else kernels.matmul

    def product(flops: float, rate: float, size: float) -> float:
        """A forward product's FLOPs are two for each weight read."""
        return max(flops * tokens / rate, flops / 2 * size / device.bandwidth) / tp

    mixers = len(_mixers(shape, part))
    project = product(part.of_mixers, kernels.matmul, 2.0)
    core = _core(part, shape, machine, serving)
    dense = product(part.dense, rate, size)
    dense += product(part.plain, kernels.matmul, 2.0)
    dense += part.gathered * _all_reduce(shape, serving, device.nvlink)
    dispatch, experts, combine = _mixture(part, shape, machine, serving)
    together = project + core + dense + dispatch + experts + combine
    if part.shortcut and mixers == 2:
        second = max(dispatch, dense / 2 + project / 2)
        last = max(combine, core / 2 + dense / 2)
        together = (project + core) / 2 + second + experts + last
    first = (project + core) / max(1, mixers)
    return Layer(first, dense, dispatch, experts, combine, together)


def _core(part: Part, shape: Shape, machine: Machine, serving: Serving) -> float:
    """Attention over the cache, as fast as its products or as its bytes."""
    flops = 0.0
    held = 0
    for mixer, config in _mixers(shape, part):
        if config is None:
            # `flops` is of the causal half.
            flops += mixer.flops(2 * serving.context)
        else:
            # Absorbed: every head meets the latent and the rotated key, then the latent.
            width = 2 * config.kv_rank + config.rope_width
            flops += 2.0 * config.heads * width * serving.context
        held += mixer.state_bytes(serving.context, torch.bfloat16)
    device, hopper = machine.cluster.device, HOPPER[NEWEST]
    faster = machine.kernels.attention / hopper.attention
    compute = flops * serving.batch * serving.tokens / (DECODE_ATTENTION * faster)
    read = held * serving.batch / (DECODE_CACHE * device.bandwidth / 2.9e12)
    return max(compute, read) / serving.tp


def _mixture(
    part: Part, shape: Shape, machine: Machine, serving: Serving
) -> tuple[float, float, float]:
    """Seconds of dispatch, experts and combine."""
    if not part.routes:
        return 0.0, 0.0, 0.0
    device, ep = machine.cluster.device, serving.ep
    tokens, size = serving.batch * serving.tokens, 1.0 if shape.fp8 else 2.0
    grouped = DECODE_GROUPED * device.peak_fp8 / 1978.9e12 if shape.fp8 else machine.kernels.grouped
    touched = max(
        1.0 - (1.0 - route.per_token / route.experts) ** (tokens * ep) for route in part.routes
    )
    held = part.expert_params / ep / serving.tp * size * touched
    experts = max(part.grouped * tokens / serving.tp / grouped, held / device.bandwidth)
    if ep == 1:
        return 0.0, experts, 0.0
    known = [n for n in LOW_LATENCY if n <= ep] or [min(LOW_LATENCY)]
    links = LOW_LATENCY[max(known)]
    copies = tokens * sum(route.per_token for route in part.routes) * shape.width
    dispatch = copies * (FP8_BYTES if shape.fp8 else 2.0) / links[0]
    return dispatch, experts, copies * 2.0 / links[1]


def _all_reduce(shape: Shape, serving: Serving, nvlink: float) -> float:
    """A sum over the tensor ranks; its rate is that of messages of its size."""
    if serving.tp == 1:
        return 0.0
    size = 2.0 * shape.width * serving.batch * serving.tokens
    known = [least for least in ALL_REDUCE if least <= size] or [min(ALL_REDUCE)]
    link = ALL_REDUCE[max(known)] * nvlink / 380e9
    return 2.0 * (serving.tp - 1) / serving.tp * size / link


def serving_bytes(shape: Shape, serving: Serving) -> float:
    """Bytes of a device: weights as they are served, and the cache of its sequences."""
    size = 1.0 if shape.fp8 else 2.0
    bf16 = sum(2.0 * (p.of_mixers + p.plain) / 2 for p in shape.parts)
    dense = sum(p.dense_params for p in shape.parts)
    other = max(0.0, dense - bf16 / 2)
    experts = sum(p.expert_params for p in shape.parts)
    mixers = [mixer for block in shape.model.blocks() for mixer in block.mixers()]
    cache = sum(mixer.state_bytes(serving.context, torch.bfloat16) for mixer in mixers)
    weights = (bf16 + other * size) / serving.tp + experts * size / (serving.ep * serving.tp)
    return weights + serving.batch * cache / serving.tp


def servings(
    shape: Shape, cluster: Cluster, context: int, batch: int | None, acceptance: float
) -> tuple[list[Serving], int]:
    """For every layout the largest batch that fits (or `batch`), and how many do not fit at all."""
    tokens = 2 if acceptance else 1
    layouts = [
        (1, ep)
        for ep in range(1, cluster.size + 1)
        if cluster.size % ep == 0 and all(count % ep == 0 for count in shape.experts)
        if ep == 1 or shape.experts
    ]
    layouts += [
        (tp, 1)
        for tp in range(2, cluster.per_node + 1)
        if cluster.per_node % tp == 0 and all(count % tp == 0 for _, count in shape.heads)
    ]
    fitting: list[Serving] = []
    for tp, ep in layouts:
        sizes = [batch] if batch else [1 << i for i in range(10, -1, -1)]
        tried = (Serving(size, context, ep, tp, tokens, acceptance) for size in sizes)
        fits = (s for s in tried if serving_bytes(shape, s) <= cluster.device.memory)
        best = next(fits, None)
        if best is not None:
            fitting.append(best)
    return fitting, len(layouts) - len(fitting)


def _mixers(shape: Shape, part: Part) -> list[tuple[Mixer, MLA | None]]:
    """The mixers of a part, those that keep latents with their config."""
    if part.name != "unit":
        return []
    blocks, layers = shape.model.blocks(), shape.model.config.layers
    unit = shape.model.units()[shape.parts.index(part) - 1]
    return [(mixer, next(_latent(layers[i]), None)) for i in unit for mixer in blocks[i].mixers()]


def _latent(config: object) -> Iterator[MLA]:
    """Every MLA in a layer's config."""
    if isinstance(config, MLA):
        yield config
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        for field in dataclasses.fields(config):
            yield from _latent(getattr(config, field.name))
