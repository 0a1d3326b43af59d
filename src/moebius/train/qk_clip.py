"""QK-Clip (Kimi K2, arXiv 2507.20534, 2.1): no head's logits grow past a threshold.

After the optimizer's step the largest logit of each head, S, is measured; where S is above the
threshold, the head's query and key weights shrink its logits by gamma = threshold / S. S comes from
one extra forward without gradients over the first sequence of the step's batch, with the weights
just updated: exact there, a sample of the batch. It costs a third of a training step of that one
sequence, every `every` steps, on each of several ranks alike. No tap is read; the mixers say their
own logits. Letters as in `gqa`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moebius.data.loader import Batch
from moebius.model.context import Context
from moebius.model.lm import LM
from moebius.model.mixers import Mixer
from moebius.model.mixers.logits import ScaleRows, scale_rows
from moebius.ops.ranks import Group, first
from moebius.optim.optimizer import OptimConfig
from moebius.optim.rules.schedule_free import ScheduleFree


@dataclasses.dataclass(frozen=True)
class QKClip:
    """Clip heads whose largest logit is above `threshold`, looking every `every` steps."""

    threshold: float = 100.0
    every: int = 1

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be above 0, not {self.threshold}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")

    def check(self, model: LM, optim: OptimConfig) -> None:
        """ValueError where no mixer has logits to clip, or what is clipped would come back."""
        if not clippable(model):
            raise ValueError(
                "qk_clip has nothing to clip here: every mixer norms its queries and keys or has "
                "no softmax; write qk_clip=none"
            )
        for name in ("matrix", "bias"):
            if name in optim.roles and isinstance(optim.roles[name].rule, ScheduleFree):
                raise ValueError(
                    f"qk_clip scales weights, which schedule_free ({name}) makes anew from its own "
                    "copies at every step; take another rule or write qk_clip=none"
                )

    def due(self, step: int) -> bool:
        """Whether `step`, counted from 0, is one to look at."""
        return (step + 1) % self.every == 0

    def clip(
        self,
        found: Sequence[tuple[Mixer, Tensor]],
        scale: ScaleRows = scale_rows,
        everyone: Group = None,
    ) -> "Clipped":
        """Clip the heads whose largest logit, as `logits_by_mixer` has it, is above the threshold.

        Of several ranks, `everyone` looked at the same; `scale` does what each holds of a weight.
        """
        # Not every rank need have the same last bit of a logit.
        found = [(mixer, first(max_H, everyone)) for mixer, max_H in found]
        heads = 0
        for mixer, max_H in found:
            # Logits that are not finite say nothing of a factor; their loss is skipped elsewhere.
            above_H = (max_H > self.threshold) & max_H.isfinite()
            if above_H.any():
                heads += int(above_H.sum())
                with torch.no_grad():
                    gamma_H = torch.where(above_H, self.threshold / max_H, 1.0)
                    mixer.clip_logits(gamma_H, scale)
        return Clipped(float(torch.cat([max_H for _, max_H in found]).max()), heads)


@dataclasses.dataclass(frozen=True)
class Clipped:
    """The largest logit before clipping, and how many heads were clipped."""

    logit_max: float
    heads: int


def clippable(model: nn.Module) -> list[Mixer]:
    """The mixers whose logits may be clipped, those of ends included."""
    return [part for part in model.modules() if isinstance(part, Mixer) and part.clippable]


@torch.no_grad()
def logits_by_mixer(
    model: LM, batch: Batch, ctx: Context, dtype: torch.dtype
) -> list[tuple[Mixer, Tensor]]:
    """max_H of every clippable mixer, from one forward; ValueError for one that it never met."""
    mixers = clippable(model)
    found: dict[Mixer, Tensor] = {}

    def look(mixer: Mixer) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, given: Any) -> None:
            x_BTD, ctx, _, borrowed = given
            max_H = mixer.max_logits(x_BTD, ctx, borrowed)
            found[mixer] = torch.maximum(found[mixer], max_H) if mixer in found else max_H

        return hook

    with contextlib.ExitStack() as closing:
        for mixer in mixers:
            closing.callback(mixer.register_forward_pre_hook(look(mixer)).remove)
        if clippable(model.ends):
            model.loss(batch.tokens_BT, batch.targets_BT, ctx, dtype=dtype)
        else:
            model(batch.tokens_BT, ctx, dtype=dtype)
    missing = sum(mixer not in found for mixer in mixers)
    if missing:
        raise ValueError(
            f"qk_clip cannot see {missing} of {len(mixers)} mixers: a block calls its mixer with "
            "keyword arguments or not at all"
        )
    return list(found.items())
