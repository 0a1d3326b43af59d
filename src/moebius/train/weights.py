"""The weights of a model among ranks: cut, sharded, and where layers are divided, in stages.

One process holds them whole. Several hold parts under the same names, so that a checkpoint, an
optimizer and a metric ask for a weight and need not know who has it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from moebius.checkpoint.stored import Readable
from moebius.model.lm import LM
from moebius.model.stage import PipeStage, borrowed_by, divided, stage_of
from moebius.model.weight import PRODUCT_ROLES, Filling, named_weights
from moebius.ops.ranks import Cut
from moebius.ops.shard import Fragment, Rows, Shard
from moebius.optim.optimizer import Optimizer
from moebius.optim.rules import Slot
from moebius.optim.transfer import transferred
from moebius.parallel.pipeline import Lent, Pipeline
from moebius.parallel.plan import local, part_of, sharded, shares_of
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

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the model, whole on every rank; collective."""
        shard = self.shards.get(name)
        return tensor if shard is None else shard.whole(local(tensor))

    def fragments(self, name: str, tensor: Tensor) -> Iterator[Fragment]:
        """What this rank has to save of a tensor of the model."""
        shard = self.shards.get(name)
        if shard is not None:
            return shard.fragments(local(tensor)) if self.world.first_replica else iter(())
        return iter([Fragment(tensor, tuple(tensor.shape))] if self.world.main else ())

    def shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """The shape of the whole of a tensor of the model."""
        shard = self.shards.get(name)
        return tuple(tensor.shape) if shard is None else shard.shape

    def part(self, name: str, whole: Tensor | Readable) -> Tensor:
        """This rank's part of it; of one in a file no more is read."""
        shard = self.shards.get(name)
        return read(whole) if shard is None else shard.part(whole)

    def scale_rows(self, weight: Tensor | None, factor_HX: Tensor) -> None:
        """As `model.mixers.logits.scale_rows`, of which each rank scales its part."""
        if weight is None:
            return
        name = next(slot.name for slot, own in self.slots if own is weight)
        heads, rows = factor_HX.shape[0], weight.shape[0]
        factor_R = factor_HX.expand(heads, rows // heads).flatten()
        part = self.part(name, factor_R).to(weight.dtype)
        local(weight).mul_(part.view(-1, *(1 for _ in weight.shape[1:])))


def read(x: Rows) -> Tensor:
    """All of a tensor that is there already or lies in a file."""
    if isinstance(x, Tensor):
        return x
    assert isinstance(x, Readable)
    return x.whole()


def filled(run: Run, model: LM, device: torch.device, world: World = ALONE) -> Weights:
    """Fill a model built `unfilled` from the run's seed, spread over the ranks."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    if world.everyone is None:
        Filling(model, run.seed, device).fill(set(model.parameters()))
        return weights_of(model)
    return _spread(run, model, device, world)


def weights_of(model: LM) -> Weights:
    """The weights of a model that is whole here."""
    named = named_weights(model)
    return Weights(ALONE, tuple((Slot(name, w.role, w.blocks), w) for name, w in named), {})


def _spread(run: Run, model: LM, device: torch.device, world: World) -> Weights:
    named, pipe = list(named_weights(model)), world.degrees.pipe
    # By the recipe's own sequence length in every stage: what ranks hold never changes in a run.
    division = divided(model, pipe.num_stages, run.sequence_length)
    names, shards = shares_of(model, world, lambda name: pipe.rank_of(stage_of(name, division)))

    def kept(name: str, whole: Tensor) -> Tensor:
        return part_of(whole, names.get(name, Cut(None)))

    filling = Filling(model, run.seed, device, kept)
    filling.leave({w for name, w in named if not shards[name].here})
    cuts: dict[Tensor, Cut] = {w: names[name] for name, w in named if name in names}
    half, pipeline = in_bf16(run, model), None
    spread = partial(sharded, cuts=cuts, world=world, fill=filling.fill, half=half)
    if world.line is None:
        spread(model, model.blocks(), keep=not run.parallel.reshard, entries=("loss",))
    else:
        pipeline = _pipeline(model, division, names, shards, spread, world)
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
    spread: Callable[..., None],
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
        spread(stage, list(stage.layers), keep=True, lent=list(stage.lent.values()))
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
