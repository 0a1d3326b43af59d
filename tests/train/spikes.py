"""An end of a user's own that spoils chosen steps, and the recipe that adds it to `tiny`.

A `value` spike makes the loss NaN; a `gradient` spike leaves it finite.
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from moebius.model.context import Context
from moebius.model.ends import End, EndConfig
from moebius.model.ends.head import Embedding, Head
from moebius.model.part import Site
from moebius.recipes import recipe
from moebius.train.run import Run

TINY = f"{Path(__file__).resolve().parents[1] / 'tiny.py'}:tiny"


@dataclasses.dataclass(frozen=True)
class Spike(EndConfig):
    """Spoils the steps listed, counted from 0."""

    value: tuple[int, ...] = ()
    gradient: tuple[int, ...] = ()

    def build(self, site: Site) -> End:
        return _Spike(self)


class _Spike(End):
    def __init__(self, config: Spike) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, hidden_BTD: Tensor, targets_BT: Tensor, ctx: Context, embed: Embedding, head: Head
    ) -> tuple[Tensor, dict[str, Tensor]]:
        step = int(ctx.step)
        if step in self.config.value:
            hidden_BTD = hidden_BTD * torch.nan
        if step in self.config.gradient:
            # Adds 0, whose derivative is 0 times infinity.
            hidden_BTD = hidden_BTD + (hidden_BTD * 0).abs().sqrt()
        return hidden_BTD, {}


def spiky() -> Run:
    """`tiny` with an end that can spoil steps; none yet."""
    run = recipe(TINY)
    model = dataclasses.replace(run.model, ends=(*run.model.ends, Spike()))
    return dataclasses.replace(run, name="spiky", model=model)
