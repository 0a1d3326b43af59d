"""The state of a training run: everything that a checkpoint must hold for the next step to be
exact.

Weights, router buffers, optimizer moments, counters and torch's own random state. Data needs no
state: its order is a pure function of the step.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius import checkpoint
from moebius.model.lm import LM
from moebius.model.weight import initialise, named_weights, set_products
from moebius.optim.optimizer import Optimizer
from moebius.optim.rules import Slot
from moebius.optim.transfer import transferred
from moebius.train.precision import products_of
from moebius.train.run import Run


@dataclasses.dataclass
class TrainState:
    """What moves while training. `step` counts steps done, skipped ones included."""

    model: LM
    optimizer: Optimizer
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    bad_in_a_row: int = 0
    # Heads that QK-Clip scaled down, each time it did.
    clipped_heads: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name, the real ones, not copies."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        moments = self.optimizer.state_tensors()
        tensors |= {f"optim.{name}": tensor for name, tensor in moments.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        return tensors

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
            return checkpoint.save(folder, self.step, self.tensors(), state, keep=keep)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Take over a checkpoint's state; strict about every name."""
        random_cpu = tensors.pop("random.cpu")
        random_cuda = tensors.pop("random.cuda", None)
        self.take_weights(tensors)
        self.optimizer.load_state_tensors(
            {k.removeprefix("optim."): v for k, v in tensors.items() if k.startswith("optim.")}
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
        odd += [name for name in own.keys() & saved if own[name].shape != saved[name].shape]
        if odd:
            raise ValueError(f"the checkpoint does not fit this model: {', '.join(odd[:5])}")
        self.model.load_state_dict(saved)

    def rebuild(self, run: Run, device: torch.device) -> None:
        """Carry everything over into a model built anew from the run's config, as a resume does.

        The old model is gone before the new one is there: an accelerator never holds two.
        """
        with self.optimizer.evaluation_weights():
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in self.tensors().items()}
        counters = self.counters()
        del self.model, self.optimizer
        self.model, self.optimizer = _model_of(run, device)
        self.restore(tensors, counters)


def new_state(run: Run, device: torch.device) -> TrainState:
    """The state before the first step: weights drawn from the run's seed."""
    return TrainState(*_model_of(run, device))


def _model_of(run: Run, device: torch.device) -> tuple[LM, Optimizer]:
    torch.manual_seed(run.seed)
    model = run.model.build(run.vocab)
    initialise(model, run.seed)
    if run.precision == "fp64":
        model.double()
    model.to(device)
    set_products(model, products_of(run))
    return model, optimizer_of(run, model)


def optimizer_of(run: Run, model: LM) -> Optimizer:
    """A fresh optimizer of the model's weights; ValueError where a rule is missing or unfit."""
    slots = [(Slot(name, w.role, w.blocks), w) for name, w in named_weights(model)]
    return Optimizer(transferred(run.optim, run.model.width), slots)
