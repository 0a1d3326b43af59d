"""What the planner needs of a model: for every unlendable unit its FLOPs, bytes and parameters.

All of it is read off the model on meta: products from its weights, attention from its mixers,
optimizer states from the run's rules. Equal layers give equal parts, so a plan of 126 layers works
with a few numbers.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from moebius.lab.memory import kept_bytes, optimizer_bytes
from moebius.lab.plan import cache_bytes_per_token
from moebius.model.block import Block
from moebius.model.block.scmoe import ScMoE
from moebius.model.count import Counts, Use, count, uses
from moebius.model.ffn.moe import MoELayer
from moebius.model.lm import LM
from moebius.model.mixers import Mixer
from moebius.train.run import Run


@dataclasses.dataclass(frozen=True)
class Route:
    """A mixture: how many experts, how many of them a mean token gets, from how many groups."""

    experts: int
    per_token: float
    groups: int | None


@dataclasses.dataclass(frozen=True)
class Part:
    """A unit of layers, or an end. FLOPs and bytes are forward, per token."""

    name: str
    # Products with weights: of mixers, other dense ones, those that stay in bf16, of experts.
    of_mixers: float = 0.0
    dense: float = 0.0
    plain: float = 0.0
    grouped: float = 0.0
    mixing: float = 0.0
    # Residual writes; each reads and writes the stream.
    writes: int = 0
    # Bytes in bf16 that the backward needs, and those that a format of 8 bits reads and writes.
    kept: float = 0.0
    quantised_forward: float = 0.0
    quantised_backward: float = 0.0
    # Bytes of keys and values that other chunks of the sequence need.
    cache: float = 0.0
    # Sub-layers that tensor parallelism gathers before and scatters after.
    gathered: int = 0
    routes: tuple[Route, ...] = ()
    # Two batches need not be told apart: the mixture runs beside the rest of its block.
    shortcut: bool = False
    dense_params: int = 0
    expert_params: int = 0
    dense_states: int = 0
    expert_states: int = 0

    @property
    def weight(self) -> float:
        """FLOPs in all: what stages are balanced by."""
        return self.of_mixers + self.dense + self.plain + self.grouped + self.mixing


@dataclasses.dataclass(frozen=True)
class Shape:
    """A run as the planner sees it: an embedding, units of layers, and the head with its ends."""

    name: str
    width: int
    vocab: int
    context: int
    parts: tuple[Part, ...]
    # What degrees have to divide, by name.
    heads: tuple[tuple[str, int], ...]
    experts: tuple[int, ...]
    counts: Counts
    fp8: bool
    model: LM

    @property
    def units(self) -> int:
        """Units of layers: what a pipeline is cut into."""
        return len(self.parts) - 2


def shape_of(run: Run, context: int) -> Shape:
    """The shape of a run at a sequence length."""
    if run.precision not in ("auto", "bf16", "fp8"):
        raise ValueError(
            f"plans for clusters know bf16 and fp8; say precision=bf16, not {run.precision}"
        )
    with torch.device("meta"):
        model = run.model.build(run.vocab)
    width = run.model.width
    names = ["embed", *(f"layers.{unit.start}" for unit in model.units()), "head"]
    unit_of = {f"layers.{i}": f"layers.{u.start}" for u in model.units() for i in u}
    totals: dict[str, defaultdict[str, float]] = {name: defaultdict(float) for name in names}
    states = optimizer_bytes(run, model)
    for use in uses(model):
        first = ".".join(use.name.split(".")[:2]) if use.name.startswith("layers.") else "head"
        place = "embed" if use.name.startswith("embed.") else unit_of.get(first, "head")
        _add_weight(totals, place, use, states[use.name])
    routes: dict[str, list[Route]] = defaultdict(list)
    for i, block in enumerate(model.blocks()):
        _add_block(totals[unit_of[f"layers.{i}"]], routes[unit_of[f"layers.{i}"]], block, context)
    for end in model.ends:
        mixers = [module for module in end.modules() if isinstance(module, Mixer)]
        totals["head"]["mixing"] += sum(mixer.flops(context) for mixer in mixers)
        totals["head"]["gathered"] += 2 * len(mixers)
    layers = run.model.layers
    for i, layer in enumerate(layers):
        totals[unit_of[f"layers.{i}"]]["writes"] += layer.num_writes
    short = {unit_of[f"layers.{i}"] for i, each in enumerate(layers) if isinstance(each, ScMoE)}
    parts = tuple(_part(name, totals[name], routes[name], name in short) for name in names)
    divided = sorted({*_named(run.model, ("heads", "kv_heads", "hidden")), ("vocab", run.vocab)})
    experts = sorted({route.experts for part in parts for route in part.routes})
    return Shape(
        run.name,
        width,
        run.vocab,
        context,
        parts,
        tuple(divided),
        tuple(experts),
        count(model, context),
        run.precision == "fp8",
        model,
    )


def _add_weight(
    totals: Mapping[str, defaultdict[str, float]], place: str, use: Use, states: int
) -> None:
    kind = "expert" if use.group == "experts" else "dense"
    totals[place][f"{kind}_params"] += use.weight.numel()
    totals[place][f"{kind}_states"] += states
    if not use.weight.is_matrix or (use.weight.role == "embedding" and place != "embed"):
        return
    flops = 2.0 * use.share[1] * use.weight.numel()
    into = totals["head" if place == "embed" else place]
    plain = use.weight.role not in ("matrix", "expert")
    group = "grouped" if kind == "expert" else "of_mixers" if use.group == "mixers" else "dense"
    into["plain" if plain else group] += flops
    if use.group != "head":
        into["kept"] += kept_bytes(use, 2)
    if not plain:
        outputs, inputs = use.weight.shape[-2], use.weight.shape[-1]
        # Inputs go from two bytes to one; for the weight's gradient they go to columns, and the
        # gradients of outputs go to both.
        rows = flops / (2.0 * outputs * inputs)
        into["quantised_forward"] += rows * 3.0 * inputs
        into["quantised_backward"] += rows * (2.0 * inputs + 6.0 * outputs)


def _add_block(
    total: defaultdict[str, float], routes: list[Route], block: Block, context: int
) -> None:
    mixers = block.mixers()
    total["mixing"] += sum(mixer.flops(context) for mixer in mixers)
    total["cache"] += cache_bytes_per_token(mixers)
    total["gathered"] += 2 * len(mixers)
    for module in block.modules():
        if isinstance(module, MoELayer):
            groups = dict(_named(module.config.router, ("top_groups",))).get("top_groups")
            routes.append(Route(module.config.experts, module.layout.ffn_per_token, groups))
            if module.shared_gate_up is None and len(mixers) == 1:
                total["gathered"] -= 1


def _part(name: str, total: Mapping[str, float], routes: list[Route], shortcut: bool) -> Part:
    whole = {"writes", "gathered", "dense_params", "expert_params", "dense_states", "expert_states"}
    known = {field.name for field in dataclasses.fields(Part)}
    numbers = {k: round(v) if k in whole else v for k, v in total.items() if k in known}
    label = "unit" if name.startswith("layers.") else name
    return Part(name=label, routes=tuple(routes), shortcut=shortcut, **numbers)  # pyright: ignore


def _named(config: Any, wanted: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Every whole number under one of these field names, anywhere in a config tree."""
    if isinstance(config, tuple):
        for item in dict.fromkeys(config):
            yield from _named(item, wanted)
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.name in wanted and isinstance(value, int):
                yield field.name, value
            else:
                yield from _named(value, wanted)
