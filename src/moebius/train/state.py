"""The state of a training run: everything that a checkpoint must hold for the next step to be
exact.

Weights, router buffers, optimizer moments, counters and torch's own random state. Data needs no
state: its order is a pure function of the step.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius import checkpoint
from moebius.checkpoint.distributed import save_fragments
from moebius.checkpoint.stored import Readable
from moebius.model.lm import LM
from moebius.model.weight import set_products, unfilled
from moebius.ops.shard import Fragment
from moebius.optim.optimizer import Optimizer
from moebius.parallel.plan import local
from moebius.parallel.world import ALONE, World
from moebius.train.precision import products_of
from moebius.train.run import Run
from moebius.train.weights import Weights, filled, optimizer_of, read


@dataclasses.dataclass
class TrainState:
    """What moves while training. `step` counts steps done, skipped ones included.

    On several ranks each holds a part of the weights and states; methods that say so are collective
    then: all ranks must call them.
    """

    model: LM
    optimizer: Optimizer
    weights: Weights
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
        return tensors | _random_state()

    def fragments(self) -> dict[str, list[Fragment]]:
        """What this rank has to save, by the names of `tensors`; all ranks together have it all."""
        world = self.weights.world
        found = {
            f"model.{name}": list(self.weights.fragments(name, x))
            for name, x in self.model.state_dict().items()
        }
        if world.first_replica:
            for name in self.optimizer.state_tensors():
                found[f"optim.{name}"] = list(self.optimizer.fragments(name))
        if world.main:
            for name, x in _random_state().items():
                found[name] = [Fragment(x, tuple(x.shape))]
        return found

    def counters(self) -> dict[str, Any]:
        """The plain numbers of the state."""
        names = ("step", "tokens", "seconds", "skipped", "bad_in_a_row", "clipped_heads")
        return {name: getattr(self, name) for name in names}

    def save(
        self,
        folder: Path,
        keep: int,
        facts: dict[str, Any],
        background: checkpoint.Background | None = None,
    ) -> None:
        """Save a checkpoint; `facts` (data digest, precision) are checked at resume. Collective.

        Its weights are those to use: with schedule_free the averages, not those in training.
        """
        state, savers = {**self.counters(), **facts}, self.weights.world.savers
        with self.optimizer.evaluation_weights():
            if savers is not None:
                found = self.fragments()
                save_fragments(folder, self.step, found, state, keep, savers, background)
            elif background is not None:
                background.save(folder, self.step, self.tensors(), state, keep=keep)
            else:
                checkpoint.save(folder, self.step, self.tensors(), state, keep=keep)

    def restore(self, tensors: Mapping[str, Tensor | Readable], counters: dict[str, Any]) -> None:
        """Take over a checkpoint's state, each rank its part; strict about every name."""
        self.take_weights(tensors)
        rest = {name: self._part(name, x) for name, x in tensors.items() if not _is_weight(name)}
        self._take_rest(rest, counters)

    def _part(self, name: str, whole: Tensor | Readable) -> Tensor:
        """This rank's part of a moment, or all of a random state."""
        _, is_moment, moment = name.partition("optim.")
        return read(self.optimizer.state_part(moment, whole) if is_moment else whole)

    @torch.no_grad()
    def _take_rest(self, parts: Mapping[str, Tensor], counters: dict[str, Any]) -> None:
        """All but the weights, of each moment this rank's part."""
        moments = {k.removeprefix("optim."): v for k, v in parts.items() if k.startswith("optim.")}
        self.optimizer.load_state_tensors(moments)
        # Checkpoints of runs before there was QK-Clip do not count its heads.
        counters = {"clipped_heads": 0, **counters}
        for name in self.counters():
            setattr(self, name, counters[name])
        torch.set_rng_state(parts["random.cpu"])
        if "random.cuda" in parts and torch.cuda.is_available():
            torch.cuda.set_rng_state(parts["random.cuda"])

    @torch.no_grad()
    def take_weights(self, tensors: Mapping[str, Tensor | Readable]) -> None:
        """Copy the `model.` tensors of a checkpoint, in any dtype, into the masters."""
        own = self.model.state_dict()
        saved = {k.removeprefix("model."): x for k, x in tensors.items() if _is_weight(k)}
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
            if model is not None:
                held[name].copy_(x)
        return None if model is None else model.to(device)

    def rebuild(self, run: Run, device: torch.device) -> None:
        """Carry everything over into a model built anew from the run's config, as a resume does.

        The old model is gone before the new one is there: an accelerator never holds two.
        """
        with self.optimizer.evaluation_weights():
            parts = {name: _aside(x) for name, x in self.tensors().items()}
        counters, world = self.counters(), self.weights.world
        del self.model, self.optimizer, self.weights
        self.model, self.optimizer, self.weights = _model_of(run, device, world)
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                local(tensor).copy_(parts[f"model.{name}"])
        self._take_rest(parts, counters)


def new_state(run: Run, device: torch.device, world: World = ALONE) -> TrainState:
    """The state before the first step: weights drawn from the run's seed."""
    return TrainState(*_model_of(run, device, world))


def _model_of(run: Run, device: torch.device, world: World) -> tuple[LM, Optimizer, Weights]:
    torch.manual_seed(run.seed)
    with unfilled():
        model = _blank(run)
    set_products(model, products_of(run))
    weights = filled(run, model, device, world)
    return model, optimizer_of(run, weights), weights


def _random_state() -> dict[str, Tensor]:
    """torch's own, of every device in use."""
    found = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["random.cuda"] = torch.cuda.get_rng_state()
    return found


def _is_weight(name: str) -> bool:
    return name.startswith("model.")


def _aside(x: Tensor) -> Tensor:
    """A copy in the host's memory; what has no bytes stays so."""
    return x if x.is_meta else x.detach().to("cpu", copy=True)


def _blank(run: Run) -> LM:
    """The whole model in the dtype of its masters, not yet filled."""
    model = run.model.build(run.vocab)
    return model.double() if run.precision == "fp64" else model
