"""The weights of a model among ranks: cut, sharded, and where layers are divided, in stages.

One process holds them whole. Several hold parts under the same names, so that a checkpoint, an
optimizer and a metric ask for a weight and need not know who has it.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from moebius.checkpoint.tensors import Lazy
from moebius.model.lm import LM
from moebius.model.stage import PipeStage, borrowed_by, stage_of, stages_of
from moebius.model.weight import PRODUCT_ROLES, named_weights
from moebius.ops.ranks import Cut
from moebius.ops.shard import Shard
from moebius.optim.optimizer import Optimizer
from moebius.optim.rules import Slot
from moebius.optim.transfer import transferred
from moebius.parallel.pipeline import Lent, Pipeline
from moebius.parallel.plan import cut_down, local, sharded
from moebius.parallel.world import ALONE, World
from moebius.train.precision import products_of
from moebius.train.run import Run


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a model as its optimizer knows them, and how ranks share them.

    `slots` are in the model's order; `shards` know a tied weight by each of its names.
    """

    world: World
    slots: tuple[tuple[Slot, Tensor], ...]
    shards: Mapping[str, Shard]
    # Where the layers are divided among ranks.
    pipeline: Pipeline | None = None

    def whole(self, name: str, tensor: Tensor) -> Tensor | Lazy:
        """A tensor of the model, whole when it is asked for."""
        shard = self.shards.get(name)
        if shard is None:
            return tensor
        return Lazy(tensor.dtype, shard.shape, lambda: shard.whole(local(tensor)))

    def shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """The shape of the whole of a tensor of the model."""
        shard = self.shards.get(name)
        return tuple(tensor.shape) if shard is None else shard.shape

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of it."""
        shard = self.shards.get(name)
        return whole if shard is None else shard.part(whole)


def spread_weights(run: Run, model: LM, world: World = ALONE) -> Weights:
    """Spread a whole model over the ranks; its weights, or this rank's parts of them."""
    named = list(named_weights(model))
    if world.everyone is None:
        return Weights(world, tuple((Slot(name, w.role, w.blocks), w) for name, w in named), {})
    pipe = world.degrees.pipe
    division = stages_of(model.units(), pipe.num_stages)
    names, shards = cut_down(model, world, lambda name: pipe.rank_of(stage_of(name, division)))
    cuts: dict[Tensor, Cut] = {w: names[name] for name, w in named if name in names}
    half, pipeline = in_bf16(run, model), None
    if world.line is None:
        keep = not run.parallel.reshard
        sharded(model, model.blocks(), cuts, world, keep=keep, entries=("loss",), half=half)
    else:
        pipeline = _pipeline(model, division, names, shards, cuts, half, world)
    parts = dict(model.named_parameters())
    slots = [(Slot(name, w.role, w.blocks, shards[name]), parts[name]) for name, w in named]
    # A tied weight has a second name in the model's state.
    first = {id(part): name for name, part in parts.items()}
    both = model.named_parameters(remove_duplicate=False)
    by_name = {name: shards[first[id(part)]] for name, part in both}
    return Weights(world, tuple(slots), by_name, pipeline)


def _pipeline(
    model: LM,
    division: Sequence[tuple[range, ...]],
    names: Mapping[str, Cut],
    shards: Mapping[str, Shard],
    cuts: Mapping[Tensor, Cut],
    half: Collection[nn.Parameter],
    world: World,
) -> Pipeline:
    """The stages that this rank holds of a model that is cut down to them, each sharded."""
    pipe, line, everyone, last = world.degrees.pipe, world.line, world.everyone, len(division) - 1
    assert line is not None and everyone is not None
    stages = {
        i: PipeStage(model, division[i], first=i == 0, last=i == last)
        for i in pipe.held_by(line.rank())
    }
    for stage in stages.values():
        lent = list(stage.lent.values())
        sharded(stage, list(stage.layers), cuts, world, keep=True, lent=lent, half=half)
    copies = {name: weight for stage in stages.values() for name, weight in stage.lent.items()}
    if model.config.tied:
        model.head.w_VD = model.embed.w_VD
    borrowed: list[Lent] = []
    for name in borrowed_by(model):
        given = (model.get_parameter(name), shards[name], names.get(name, Cut(None)))
        borrowed.append(Lent(*given, copies.get(name), everyone))
    return Pipeline(stages, pipe, line, borrowed)


def in_bf16(run: Run, model: LM) -> set[nn.Parameter]:
    """The weights of layers that are multiplied in bf16, whatever they are kept in."""
    if run.precision != "bf16" or any(products_of(run).values()):
        return set()
    layers = nn.ModuleList(model.blocks())
    return {w for _, w in named_weights(layers) if w.role in PRODUCT_ROLES}


def optimizer_of(run: Run, weights: Weights) -> Optimizer:
    """A fresh optimizer of a model's weights; ValueError where a rule is missing or unfit."""
    parts = [(slot, local(weight)) for slot, weight in weights.slots]
    return Optimizer(transferred(run.optim, run.model.width), parts, weights.world.ranks.weights)
