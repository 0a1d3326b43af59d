"""What peers share: our model's plain loss and gradients, and a torch module that steps AdamW.

A peer keeps its weights in the dtype of the run (pure bf16) and steps torch's fused AdamW with the
run's betas, weight decay and clipping. It sees each row as one text.
"""

from abc import abstractmethod
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

# Relative, by what is compared. In fp32 a near-tie of a router may fall the other way for a token.
TOLERANCE = {"loss": 1e-5, "gradient": 2e-2, "loss_low": 1e-2, "gradient_norm_low": 5e-2}
# Rows of the batch that are compared.
ROWS = 2


def rule_of(run: Run) -> AdamW:
    """The AdamW of a run, or its defaults where the run has none."""
    rules = [role.rule for role in run.optim.roles.values()]
    return next((rule for rule in rules if isinstance(rule, AdamW)), AdamW())


def of_ours(model: LM, batch: Batch, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
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


def errors_of(
    mine: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]], exact: bool
) -> dict[str, float]:
    """Of a peer's loss and gradients (by equal names) against ours; in low precision their norm."""
    loss = abs(mine[0] - other[0]) / other[0]
    flats = [
        torch.cat([grads[name].flatten().float() for name in mine[1]])
        for grads in (mine[1], other[1])
    ]
    if exact:
        return {"loss": loss, "gradient": relative(flats[1], flats[0])}
    norms = [float(flat.double().norm()) for flat in flats]
    return {"loss_low": loss, "gradient_norm_low": abs(norms[0] / norms[1] - 1)}


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
