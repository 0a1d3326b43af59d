"""The pre-norm residual block: x + mixer(norm(x)), then x + ffn(norm(x)) (Llama 3, DeepSeek-V3)."""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from moebius.model.block import Block, BlockConfig, BlockOutput, States
from moebius.model.context import Context
from moebius.model.ffn import FeedForwardConfig
from moebius.model.mixers import Mixer, MixerConfig
from moebius.model.part import Norm, Site


@dataclasses.dataclass(frozen=True)
class PreNorm(BlockConfig):
    """One mixer and one feed-forward."""

    mixer: MixerConfig
    ffn: FeedForwardConfig

    @property
    def num_writes(self) -> int:
        return 2

    def build(self, site: Site) -> Block:
        return _PreNorm(self, site)


class _PreNorm(Block):
    def __init__(self, config: PreNorm, site: Site) -> None:
        super().__init__()
        self.mixer_norm = Norm(site.width, site.eps)
        self.mixer = config.mixer.build(site)
        self.ffn_norm = Norm(site.width, site.eps)
        self.ffn = config.ffn.build(site)

    def mixers(self) -> tuple[Mixer, ...]:
        return (self.mixer,)

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context,
        states: States | None,
        borrowed: Mapping[str, Tensor],
    ) -> BlockOutput:
        state = None if states is None else states[0]
        mixed_BTD, state, lent = self.mixer(self.mixer_norm(x_BTD), ctx, state, borrowed)
        x_BTD = x_BTD + mixed_BTD
        y_BTD, stats = self.ffn(self.ffn_norm(x_BTD), ctx)
        new_states = None if state is None else (state,)
        return BlockOutput(x_BTD + y_BTD, new_states, lent, () if stats is None else (stats,))
