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

from moebius.bench.agreement import relative
from moebius.bench.memory import trim
from moebius.bench.peers import Peer
from moebius.bench.peers.expressed import Expressed, express, under_our_names, write_folder
from moebius.bench.stepper import Place, Stepper
from moebius.bench.timing import seconds_of
from moebius.data.loader import Batch
from moebius.model.context import Context
from moebius.model.lm import LM
from moebius.model.weight import initialise, named_weights
from moebius.optim.rules.adamw import AdamW
from moebius.train.precision import DTYPES
from moebius.train.run import Run

SPEC = "moebius.bench.peers.transformers:Transformers"
# Relative, by what is compared. In fp32 a near-tie of a router may fall the other way for a token.
TOLERANCE = {"loss": 1e-5, "gradient": 2e-2, "loss_low": 1e-2, "gradient_norm_low": 5e-2}
# batched_mm copies the weights of every assignment, gigabytes at the length of training.
EXPERTS = ("grouped_mm", "eager")
# Rows of the batch that are compared.
ROWS = 2


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
    errors = _errors(expressed, model, batch.rows(0, ROWS), device, DTYPES[run.precision], folder)
    return Peer(
        "transformers",
        SPEC,
        {"folder": str(folder), "adamw": dataclasses.asdict(_rule(run))},
        errors,
        all(found <= TOLERANCE[name] for name, found in errors.items()),
        (*expressed.notes, "sees each row as one text, without a document mask"),
    )


def _rule(run: Run) -> AdamW:
    rules = [role.rule for role in run.optim.roles.values()]
    return next((rule for rule in rules if isinstance(rule, AdamW)), AdamW())


def _errors(
    expressed: Expressed,
    model: LM,
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
) -> dict[str, float]:
    batch, model = batch.to(device), model.to(device)
    errors: dict[str, float] = {}
    for low in (torch.float32, dtype) if dtype != torch.float32 else (torch.float32,):
        mine, grads = _of_ours(model, batch, low)
        peer = _loaded(folder, low).to(device).train()
        mean = peer_loss(peer, batch)
        mean.backward()
        other = float(mean.detach())
        given = {
            name: torch.zeros_like(x) if x.grad is None else x.grad
            for name, x in peer.state_dict(keep_vars=True).items()
        }
        theirs = under_our_names(expressed, {name: x.float().cpu() for name, x in given.items()})
        loss = abs(mine - other) / other
        ours_flat = torch.cat([grad.flatten() for grad in grads.values()])
        theirs_flat = torch.cat([theirs[name].flatten().float() for name in grads])
        if low == torch.float32:
            errors |= {"loss": loss, "gradient": relative(theirs_flat, ours_flat)}
        else:
            norms = [float(flat.double().norm()) for flat in (ours_flat, theirs_flat)]
            errors |= {"loss_low": loss, "gradient_norm_low": abs(norms[0] / norms[1] - 1)}
    return errors


def _of_ours(model: LM, batch: Batch, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """Mean loss of plain rows, and every gradient, on the CPU."""
    model.zero_grad(set_to_none=True)
    ctx = Context.continuing(batch.tokens_BT, 0)
    total = model.loss(batch.tokens_BT, batch.targets_BT, ctx, dtype=dtype).total
    mean = total / batch.tokens_BT.numel()
    mean.backward()
    grads = {
        name: (torch.zeros_like(w) if w.grad is None else w.grad).cpu()
        for name, w in named_weights(model)
    }
    return float(mean.detach()), grads


def peer_loss(model: Any, batch: Batch) -> Tensor:
    """The mean loss of a batch by a model of theirs."""
    targets = batch.targets_BT
    return model(input_ids=batch.tokens_BT, labels=targets, shift_labels=targets).loss


@final
class Transformers(Stepper):
    """Their model of the weights in `options["folder"]`."""

    def __init__(self, place: Place, options: Any) -> None:
        self.place, run = place, place.run
        self.model = _loaded(options["folder"], place.dtype).to(place.device).train()
        rule, clip = options["adamw"], run.optim.clip
        self.clip = clip
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=min(run.optim.lr, 1e-3),
            betas=(rule["beta1"], rule["beta2"]),
            eps=rule["eps"],
            weight_decay=run.optim.weight_decay,
            fused=True,
        )
        self.notes = [f"weights and moments in {str(place.dtype).removeprefix('torch.')}"]
        self._choose_experts()

    def facts(self) -> dict[str, Any]:
        total = sum(x.numel() for x in self.parameters)
        return {"params_total": total, "notes": self.notes}

    def step(self, batch: Batch) -> float:
        loss = self._gradients(batch)
        with self.place.watch:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _gradients(self, batch: Batch) -> float:
        loss = peer_loss(self.model, batch)
        loss.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        return float(loss.detach())

    def _choose_experts(self) -> None:
        """Keep the fastest experts implementation, by the second of two steps each."""
        batch = self.place.loader.batch(0).to(self.place.device)
        seconds: dict[str, float] = {}
        for name in EXPERTS if self._has_experts() else ():
            self.model.set_experts_implementation(name)
            for _ in range(2):
                seconds[name] = seconds_of(lambda: self._gradients(batch), self.place.device)
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
