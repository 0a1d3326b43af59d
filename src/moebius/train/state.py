"""The state of a training run: everything that a checkpoint must hold for the next step to be
exact.

Weights, router buffers, optimizer moments, counters and torch's own random state. Data needs no
state: its order is a pure function of the step.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius import checkpoint
from moebius.checkpoint.tensors import Lazy
from moebius.model.lm import LM
from moebius.model.mixers import Mixer
from moebius.model.weight import initialise, named_weights, set_products
from moebius.ops.ranks import Spread
from moebius.ops.shard import Shard
from moebius.optim.optimizer import Optimizer
from moebius.optim.rules import Slot
from moebius.optim.transfer import transferred
from moebius.parallel.config import Degrees
from moebius.parallel.plan import local, spread
from moebius.parallel.world import ALONE, World
from moebius.train.precision import products_of
from moebius.train.run import Run


@dataclasses.dataclass
class TrainState:
    """What moves while training. `step` counts steps done, skipped ones included.

    On several ranks each holds a part of the weights and states; methods that say so are collective
    then: all ranks must call them.
    """

    model: LM
    optimizer: Optimizer
    weights: "Weights"
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    bad_in_a_row: int = 0
    # Heads that QK-Clip scaled down, each time it did.
    clipped_heads: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name, the real ones, not copies; of cut ones the parts."""
        tensors = {f"model.{name}": local(x) for name, x in self.model.state_dict().items()}
        moments = self.optimizer.state_tensors()
        tensors |= {f"optim.{name}": tensor for name, tensor in moments.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        return tensors

    def whole_tensors(self) -> dict[str, Tensor | Lazy]:
        """`tensors`, but cut ones are made whole when asked for, by all ranks in one order."""
        tensors: dict[str, Tensor | Lazy] = dict(self.tensors())
        for name, tensor in self.model.state_dict().items():
            tensors[f"model.{name}"] = self.weights.whole(name, tensor)
        for name, tensor in self.optimizer.state_tensors().items():
            tensors[f"optim.{name}"] = self._whole_state(name, tensor)
        return tensors

    def _whole_state(self, name: str, tensor: Tensor) -> Tensor | Lazy:
        shard = self.weights.shards.get(name.rpartition(".")[0])
        if shard is None:
            return tensor
        return Lazy(tensor.dtype, shard.shape_of(tensor), partial(self.optimizer.whole_state, name))

    def counters(self) -> dict[str, Any]:
        """The plain numbers of the state."""
        names = ("step", "tokens", "seconds", "skipped", "bad_in_a_row", "clipped_heads")
        return {name: getattr(self, name) for name in names}

    def save(self, folder: Path, keep: int, facts: dict[str, Any]) -> Path:
        """Save a checkpoint; `facts` (data digest, precision) are checked at resume.

        Its weights are those to use: with schedule_free the averages, not those in training.
        """
        state = {**self.counters(), **facts}
        with self.optimizer.evaluation_weights():
            if not self.weights.world.main:
                return checkpoint.follow(folder, self.step, self.whole_tensors())
            return checkpoint.save(folder, self.step, self.whole_tensors(), state, keep=keep)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Take over a checkpoint's state; strict about every name."""
        random_cpu = tensors.pop("random.cpu")
        random_cuda = tensors.pop("random.cuda", None)
        self.take_weights(tensors)
        saved = {k.removeprefix("optim."): v for k, v in tensors.items() if k.startswith("optim.")}
        self.optimizer.load_state_tensors(
            {name: self.optimizer.state_part(name, whole) for name, whole in saved.items()}
        )
        # Checkpoints of runs before there was QK-Clip do not count its heads.
        counters = {"clipped_heads": 0, **counters}
        for name in self.counters():
            setattr(self, name, counters[name])
        torch.set_rng_state(random_cpu)
        if random_cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(random_cuda)

    @torch.no_grad()
    def take_weights(self, tensors: dict[str, Tensor]) -> None:
        """Copy the `model.` tensors of a checkpoint, in any dtype, into the masters."""
        own = self.model.state_dict()
        saved = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        odd = sorted(own.keys() ^ saved.keys())
        shapes = {name: self.weights.shape(name, x) for name, x in own.items()}
        odd += [name for name in own.keys() & saved if shapes[name] != tuple(saved[name].shape)]
        if odd:
            raise ValueError(f"the checkpoint does not fit this model: {', '.join(odd[:5])}")
        for name, tensor in own.items():
            local(tensor).copy_(self.weights.part(name, saved[name]))

    @torch.no_grad()
    def whole_model(self, run: Run, device: torch.device) -> LM | None:
        """The model on one process: on the main one of several, on all others None. Collective."""
        if not self.weights.shards:
            return self.model
        model = _blank(run) if self.weights.world.main else None
        held = {} if model is None else model.state_dict()
        for name, tensor in self.model.state_dict().items():
            x = self.weights.whole(name, tensor)
            x = x.make() if isinstance(x, Lazy) else x
            if model is not None:
                held[name].copy_(x)
        return None if model is None else model.to(device)

    def rebuild(self, run: Run, device: torch.device) -> None:
        """Carry everything over into a model built anew from the run's config, as a resume does.

        The old model is gone before the new one is there: an accelerator never holds two.
        """
        with self.optimizer.evaluation_weights():
            tensors = {name: _copy(tensor) for name, tensor in self.whole_tensors().items()}
        counters, world = self.counters(), self.weights.world
        del self.model, self.optimizer
        self.model, self.optimizer, self.weights = _model_of(run, device, world)
        self.restore(tensors, counters)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a model as its optimizer knows them, and how ranks share them.

    `slots` are in the model's order; `shards` know a tied weight by each of its names.
    """

    world: World
    slots: tuple[tuple[Slot, Tensor], ...]
    shards: Mapping[str, Shard]

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


def _copy(x: Tensor | Lazy) -> Tensor:
    return x.make().cpu() if isinstance(x, Lazy) else x.to("cpu", copy=True)


def new_state(run: Run, device: torch.device, world: World = ALONE) -> TrainState:
    """The state before the first step: weights drawn from the run's seed."""
    return TrainState(*_model_of(run, device, world))


def _model_of(run: Run, device: torch.device, world: World) -> tuple[LM, Optimizer, Weights]:
    torch.manual_seed(run.seed)
    model = _blank(run)
    initialise(model, run.seed)
    model.to(device)
    set_products(model, products_of(run))
    weights = spread_weights(run, model, world)
    return model, optimizer_of(run, weights), weights


def _blank(run: Run) -> LM:
    """The whole model in the dtype of its masters, not yet filled."""
    model = run.model.build(run.vocab)
    return model.double() if run.precision == "fp64" else model


def spread_weights(run: Run, model: LM, world: World = ALONE) -> Weights:
    """Spread a whole model over the ranks; its weights, or this rank's parts of them."""
    check_plans(model, world.degrees)
    named = list(named_weights(model))
    shards = spread(model, model.blocks(), ("loss",), world, keep=not run.parallel.reshard)
    if not shards:
        return Weights(world, tuple((Slot(name, w.role, w.blocks), w) for name, w in named), {})
    parts = dict(model.named_parameters())
    slots = [(Slot(name, w.role, w.blocks, shards[name]), parts[name]) for name, w in named]
    # A tied weight has a second name in the model's state.
    first = {id(part): name for name, part in parts.items()}
    both = model.named_parameters(remove_duplicate=False)
    return Weights(world, tuple(slots), {name: shards[first[id(part)]] for name, part in both})


def check_plans(model: LM, degrees: Degrees) -> None:
    """ValueError where a mixer cannot share its heads or its sequences among ranks."""
    asked = [name for name in ("tp", "cp") if getattr(degrees, name) > 1]
    if not asked:
        return
    for layer, block in enumerate((*model.blocks(), model.ends)):
        for mixer in (part for part in block.modules() if isinstance(part, Mixer)):
            if not any(isinstance(part, Spread) for part in mixer.modules()):
                name = type(mixer).__name__.strip("_")
                raise ValueError(
                    f"layer {layer}: {name} has no plan for parallel.{asked[0]}; use 1"
                )


def optimizer_of(run: Run, weights: Weights) -> Optimizer:
    """A fresh optimizer of a model's weights; ValueError where a rule is missing or unfit."""
    parts = [(slot, local(weight)) for slot, weight in weights.slots]
    return Optimizer(transferred(run.optim, run.model.width), parts, weights.world.ranks.weights)
