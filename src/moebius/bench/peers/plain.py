"""What peers share: a comparison with our loss and gradients, and a torch module that steps AdamW.

A peer keeps its weights in the dtype of the run (pure bf16) and steps torch's fused AdamW with the
run's betas, weight decay and clipping. It sees each row as one text.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moebius.bench.agreement import relative
from moebius.bench.stepper import Place, Stepper
from moebius.data.loader import Batch
from moebius.model.context import Context
from moebius.model.lm import LM
from moebius.model.weight import named_weights
from moebius.optim.rules.adamw import AdamW
from moebius.train.run import Run

Grads = Mapping[str, Tensor]
# Relative, by what is compared. In fp32 a near-tie of a router may fall the other way for a token.
TOLERANCE = {"loss": 1e-5, "gradient": 2e-2, "loss_low": 1e-2, "gradient_norm_low": 5e-2}
# Rows of the batch that are compared.
ROWS = 2


def rule_of(run: Run) -> AdamW:
    """The AdamW of a run, or its defaults where the run has none."""
    rules = [role.rule for role in run.optim.roles.values()]
    return next((rule for rule in rules if isinstance(rule, AdamW)), AdamW())


def errors_of(
    model: LM,
    batch: Batch,
    dtype: torch.dtype,
    load: Callable[[torch.dtype], Any],
    loss: Callable[[Any, Batch], Tensor],
    paired: Callable[[Grads, Grads], tuple[Grads, Grads]],
) -> dict[str, float]:
    """Of a peer's loss and gradients on plain rows against ours: in fp32, then in `dtype` too.

    `load` makes the peer in a dtype, with our weights, on our device; `paired` gives our gradients
    and theirs, on the CPU, equal names. In low precision the gradients' norms are compared.
    """
    rows, errors = batch.rows(0, ROWS), {}
    for low in dict.fromkeys((torch.float32, dtype)):
        mine = _of_ours(model, rows, low)
        peer = load(low).train()
        mean = loss(peer, rows)
        mean.backward()
        ours, theirs = paired(mine[1], _grads(peer.state_dict(keep_vars=True).items()))
        errors |= _errors(mine[0] / float(mean.detach()) - 1, ours, theirs, low == torch.float32)
    return errors


def _of_ours(model: LM, batch: Batch, dtype: torch.dtype) -> tuple[float, Grads]:
    model.zero_grad(set_to_none=True)
    ctx = Context.continuing(batch.tokens_BT, 0)
    total = model.loss(batch.tokens_BT, batch.targets_BT, ctx, dtype=dtype).total
    mean = total / batch.tokens_BT.numel()
    mean.backward()
    return float(mean.detach()), _grads(named_weights(model))


def _grads(weights: Iterable[tuple[str, Tensor]]) -> Grads:
    return {
        name: (torch.zeros_like(w) if w.grad is None else w.grad).float().cpu()
        for name, w in weights
    }


def _errors(loss: float, ours: Grads, theirs: Grads, exact: bool) -> dict[str, float]:
    flats = [torch.cat([grads[name].flatten() for name in ours]) for grads in (ours, theirs)]
    if exact:
        return {"loss": abs(loss), "gradient": relative(flats[1], flats[0])}
    norms = [float(flat.double().norm()) for flat in flats]
    return {"loss_low": abs(loss), "gradient_norm_low": abs(norms[0] / norms[1] - 1)}


def agree(errors: dict[str, float]) -> bool:
    """Whether all of them are small enough."""
    return all(found <= TOLERANCE[name] for name, found in errors.items())


class Plain(Stepper):
    """A torch module with its optimizer."""

    def __init__(self, place: Place, options: Any, model: Any) -> None:
        self.place, self.model, run = place, model.train(), place.run
        self.clip = run.optim.clip
        self.parameters = list(self.model.parameters())
        rule = options["adamw"]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=min(run.optim.lr, 1e-3),
            betas=(rule["beta1"], rule["beta2"]),
            eps=rule["eps"],
            weight_decay=run.optim.weight_decay,
            fused=True,
        )
        self.notes = [f"weights and moments in {str(place.dtype).removeprefix('torch.')}"]

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch."""

    def facts(self) -> dict[str, Any]:
        total = sum(x.numel() for x in self.parameters)
        return {"params_total": total, "notes": self.notes}

    def step(self, batch: Batch) -> float:
        loss = self.gradients(batch)
        with self.place.watch:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss

    def gradients(self, batch: Batch) -> float:
        """Forward, backward and clipping; the loss."""
        loss = self.loss(batch)
        loss.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        return float(loss.detach())
