"""Our own model as a benchmark steps it: the training step of the house, nothing left out."""

from typing import Any, final

import torch

from moebius.bench.split import split_of
from moebius.bench.stepper import Place, Stepper
from moebius.data.loader import Batch
from moebius.model.count import count
from moebius.ops.native.memory import keep_freed_memory
from moebius.train.state import new_state
from moebius.train.step import Stats, train_step

SPEC = "moebius.bench.ours:Ours"


@final
class Ours(Stepper):
    """A run's model, optimizer and step."""

    def __init__(self, place: Place, options: Any) -> None:
        keep_freed_memory()  # As a session does.
        self.run, self.dtype = place.run, place.dtype
        self.state = new_state(place.run, place.device)
        self._stats: Stats = ()
        optimizer = self.state.optimizer
        setattr(optimizer, "step", place.watch(optimizer.step))  # noqa: B010

    def facts(self) -> dict[str, Any]:
        counts = count(self.state.model, self.run.sequence_length)
        return {
            "params_total": counts.total,
            "params_active_mean": counts.active_mean,
            "flops_per_token": counts.flops_train,
            "notes": ["keeps freed memory, in huge pages where the system allows"],
        }

    def step(self, batch: Batch) -> float:
        result = train_step(self.run, self.state, batch, self.dtype, None, False)
        self._stats = result.stats
        return result.loss

    def after(self) -> dict[str, Any]:
        """How the last step's routing lay: FFN experts a token, and the fullest expert's load."""
        layers = [stats for block in self._stats for stats in block]
        if not layers:
            return {}
        slots = torch.arange(len(layers[0].hist_S), device=layers[0].hist_S.device)
        means = [float((x.hist_S * slots).sum() / x.num_tokens) for x in layers]
        loads = [float(x.count_E.max() / x.count_E.double().mean()) for x in layers]
        return {"ffn_per_token": sum(means) / len(means), "max_load": max(loads)}

    def split(self, place: Place, steps: int) -> dict[str, float]:
        def step() -> None:
            batch = place.loader.batch(place.steps).to(place.device)
            self.step(batch)
            place.steps += 1

        return split_of(self.state.model, self.state.optimizer, place, step, steps)
