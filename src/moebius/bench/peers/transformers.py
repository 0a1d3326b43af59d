"""transformers' own class of a run's shapes, in the form that suits it best.

Weights in the dtype of the run itself (pure bf16), torch's fused AdamW, sdpa attention, and the
experts implementation that one step found fastest. It sees the same tokens as one row without a
document mask. Before it is timed, its loss and every gradient are compared with ours: from the same
weights, on the same plain rows, in fp32, then losses and norms in the dtype of the run.
"""

import dataclasses
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from moebius.bench.memory import trim
from moebius.bench.peers import Peer
from moebius.bench.peers.expressed import express, under_our_names, write_folder
from moebius.bench.peers.plain import Plain, agree, errors_of, rule_of
from moebius.bench.stepper import Place
from moebius.bench.timing import seconds_of
from moebius.data.loader import Batch
from moebius.model.weight import initialise
from moebius.train.precision import DTYPES
from moebius.train.run import Run

SPEC = "moebius.bench.peers.transformers:Transformers"
# batched_mm copies the weights of every assignment, gigabytes at the length of training.
EXPERTS = ("grouped_mm", "eager")


def _loaded(folder: str | Path, dtype: torch.dtype) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "--peer transformers needs transformers; install it by pip install 'moebius[hf]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )


def prepare(run: Run, batch: Batch, device: torch.device, folder: Path) -> Peer:
    """Express a run, write its weights, compare; ValueError where no class of theirs can hold it.

    Its precision must be settled.
    """
    expressed = express(run)
    model = expressed.model.build(run.vocab)
    initialise(model, run.seed)
    write_folder(expressed, model, folder)
    errors = errors_of(
        model.to(device),
        batch.to(device),
        DTYPES[run.precision],
        lambda low: _loaded(folder, low).to(device),
        peer_loss,
        lambda ours, theirs: (ours, under_our_names(expressed, theirs)),
    )
    return Peer(
        "transformers",
        SPEC,
        {"folder": str(folder), "adamw": dataclasses.asdict(rule_of(run))},
        errors,
        agree(errors),
        (*expressed.notes, "sees each row as one text, without a document mask"),
    )


def peer_loss(model: Any, batch: Batch) -> Tensor:
    """The mean loss of a batch by a model of theirs."""
    targets = batch.targets_BT
    return model(input_ids=batch.tokens_BT, labels=targets, shift_labels=targets).loss


@final
class Transformers(Plain):
    """Their model of the weights in `options["folder"]`."""

    def __init__(self, place: Place, options: Any) -> None:
        super().__init__(place, options, _loaded(options["folder"], place.dtype).to(place.device))
        self._choose_experts()

    def loss(self, batch: Batch) -> Tensor:
        return peer_loss(self.model, batch)

    def _choose_experts(self) -> None:
        """Keep the fastest experts implementation, by the second of two steps each."""
        batch = self.place.loader.batch(0).to(self.place.device)
        seconds: dict[str, float] = {}
        for name in EXPERTS if self._has_experts() else ():
            self.model.set_experts_implementation(name)
            for _ in range(2):
                seconds[name] = seconds_of(lambda: self.gradients(batch), self.place.device)
                self.optimizer.zero_grad(set_to_none=True)
        if seconds:
            fastest = min(seconds, key=lambda name: seconds[name])
            self.model.set_experts_implementation(fastest)
            tried = ", ".join(f"{name} {spent:.2f} s" for name, spent in seconds.items())
            self.notes.append(f"experts {fastest} (tried {tried})")
        elif "experts" in " ".join(name for name, _ in self.model.named_parameters()):
            self.notes.append("experts by its class's own loop, the only form it has")
        trim()

    def _has_experts(self) -> bool:
        return bool(type(self.model)._can_set_experts_implementation())
