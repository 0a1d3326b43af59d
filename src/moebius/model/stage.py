"""A stage of a pipeline: some units of a model's layers, and the ends that stand at them.

The first stage has the embedding, the last the added ends and the head. What another stage holds
as well (a tied embedding, one that an end looks up in) is lent to the last. Letters: B T tokens, D
width.
"""

import copy
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from moebius.model.context import Context
from moebius.model.count import count as counted
from moebius.model.count import flops_of_layers
from moebius.model.ffn import RouteStats
from moebius.model.ffn.moe import routers_of
from moebius.model.lm import LM, closed
from moebius.model.weight import Weight

EMBEDDING = "embed.w_VD"
Module = TypeVar("Module", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class Micro:
    """A micro-batch."""

    tokens_BT: Tensor
    targets_BT: Tensor
    ctx: Context


@dataclasses.dataclass
class Passage:
    """The micro-batches of a step on their way through the stages, and what they leave behind.

    `micro` makes one of a number. Torch's stages send on all that they return, so what stays on a
    rank is noted here: how many micro-batches a stage (by its first layer) has had, and by their
    number cross-entropies, sums of the ends, and by layer what routers did.
    """

    num_micros: int
    micro: Callable[[int], Micro]
    dtype: torch.dtype
    recompute: bool
    had: Counter[int] = dataclasses.field(default_factory=Counter)
    totals: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    sums: dict[int, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    stats: dict[tuple[int, int], tuple[RouteStats, ...]] = dataclasses.field(default_factory=dict)

    def layer(self, model: LM, layer: int) -> tuple[RouteStats, ...]:
        """What the routers of a layer did on all micro-batches; nothing where they are not here."""
        blank = [moe.nothing(self.dtype) for moe in routers_of(model.blocks()[layer])]
        for at in range(self.num_micros):
            if (more := self.stats.get((at, layer))) is not None:
                blank = [one + other for one, other in zip(blank, more, strict=True)]
        return tuple(blank)


class PipeStage(nn.Module):
    """The stage of some units (all in a row); `first` and `last` say what else it has.

    It is made after the model's parts took their groups over, and shares the model's modules.
    """

    def __init__(self, model: LM, units: Sequence[range], first: bool, last: bool) -> None:
        super().__init__()
        self.units, self.first, self.last = tuple(units), first, last
        # As methods, since a model that is a part of its own part would never end.
        self._through, self._added = model.through, model.added
        blocks = model.blocks()
        self.layers = nn.ModuleList(blocks[i] for unit in units for i in unit)
        # Weights of another stage that are needed here, by their names in the model; without rows
        # until they are lent.
        self.lent: dict[str, Weight] = {}
        self.embed = model.embed if first else None
        if last:
            w_VD = model.embed.w_VD
            lent = Weight((1, model.config.width), w_VD.role)
            lent.data, lent.place = lent.data[:0].to(w_VD.dtype), w_VD.place
            self.lent[EMBEDDING] = lent
            self.embed_again = _with(model.embed, lent)
            self.ends = model.ends
            self.head = _with(model.head, lent) if model.config.tied else model.head

    def forward(self, x: Tensor, *, passage: Passage) -> Tensor:
        """Hidden states for the next stage; of the last one the micro-batch's part of the loss.

        `x` are hidden states_BTD, which the first stage does not read. Micro-batches come in order.
        """
        first_layer = self.units[0].start
        number = passage.had[first_layer]
        passage.had[first_layer] += 1
        micro = passage.micro(number)
        if self.first:
            assert self.embed is not None
            x = self.embed(micro.tokens_BT, passage.dtype)
        out = self._through(self.units, x, micro.ctx, None, passage.recompute)
        layers = (i for unit in self.units for i in unit)
        passage.stats |= {(number, i): one for i, one in zip(layers, out.stats, strict=True)}
        if not self.last:
            return out.hidden_BTD
        given = (out.hidden_BTD, micro.targets_BT, micro.ctx)
        total, sums = closed(self._added(), *given, self.embed_again, self.head)
        passage.totals[number] = total.detach()
        passage.sums[number] = {name: value.detach() for name, value in sums.items()}
        return total / micro.ctx.num_targets


def _with(module: Module, weight: Weight) -> Module:
    """The same module with another weight w_VD, but for which they share everything."""
    twin = copy.copy(module)
    twin._parameters = {**module._parameters, "w_VD": weight}
    return twin


def divided(model: LM, count: int, context: int) -> tuple[tuple[range, ...], ...]:
    """The units of a model in `count` stages, by the FLOPs of a token at a context length.

    The last stage has the ends and the head as well. ValueError as `stages_of`.
    """
    units, costs = model.units(), flops_of_layers(model, context)
    own = [sum(costs[i] for i in unit) for unit in units]
    own[-1] += counted(model, context).flops_forward - sum(costs)
    return stages_of(units, own, count)


def stages_of(
    units: Sequence[range], costs: Sequence[float], count: int
) -> tuple[tuple[range, ...], ...]:
    """Units shared by `count` stages in a row, the dearest of which is as cheap as it can be.

    ValueError where there are fewer units than stages.
    """
    if len(units) < count:
        raise ValueError(
            f"a pipeline of {count} stages needs as many units of layers, but this model has "
            f"{len(units)}; choose fewer stages (parallel.pp, parallel.stages_per_rank)"
        )
    ends = cuts_of(costs, count)
    return tuple(tuple(units[a:b]) for a, b in itertools.pairwise(ends))


def cuts_of(weights: Sequence[float], pieces: int) -> list[int]:
    """Ends of contiguous pieces whose heaviest is as light as it can be, none of them empty."""
    low, high = max(weights), sum(weights)
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if len(_greedy(weights, middle)) - 1 <= pieces else (middle, high)
    cuts = _greedy(weights, high)
    while len(cuts) - 1 < pieces:
        sizes = [cuts[i + 1] - cuts[i] for i in range(len(cuts) - 1)]
        widest = sizes.index(max(sizes))
        cuts.insert(widest + 1, cuts[widest] + sizes[widest] // 2)
    return cuts


def _greedy(weights: Sequence[float], most: float) -> list[int]:
    cuts, held = [0], 0.0
    for i, weight in enumerate(weights):
        if held + weight > most * (1 + 1e-9) and i > cuts[-1]:
            cuts.append(i)
            held = 0.0
        held += weight
    return [*cuts, len(weights)]


def stage_of(name: str, stages: Sequence[Sequence[range]]) -> int:
    """The stage that holds a weight or buffer of the model, by its name."""
    where, _, rest = name.partition(".")
    if where != "layers":
        return 0 if where == "embed" else len(stages) - 1
    layer = int(rest.partition(".")[0])
    return next(i for i, units in enumerate(stages) if any(layer in unit for unit in units))


def borrowed_by(model: LM) -> tuple[str, ...]:
    """The weights of the first stage that the last one needs as well, by their names."""
    needed = model.config.tied or any(end.LOOKS_UP for end in model.added())
    return (EMBEDDING,) if needed else ()
