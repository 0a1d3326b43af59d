"""LongCat-Flash's shortcut-connected MoE (2.2, fig. 2): two attentions, two dense FFNs, one MoE.

The MoE reads the normed state after the first attention, the same tensor as the first dense FFN,
and its output joins at the END of the layer: everything between can run beside the MoE's
communication.
"""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from moebius.model.block import Block, BlockConfig, BlockOutput, States
from moebius.model.context import Context
from moebius.model.ffn import FeedForwardConfig
from moebius.model.mixers import Mixer, MixerConfig
from moebius.model.part import Norm, Site


@dataclasses.dataclass(frozen=True)
class ScMoE(BlockConfig):
    """`mixer` and `dense` are used twice, with weights of their own; `moe` once."""

    mixer: MixerConfig
    dense: FeedForwardConfig
    moe: FeedForwardConfig

    @property
    def num_writes(self) -> int:
        return 5

    def build(self, site: Site) -> Block:
        return _ScMoE(self, site)


class _ScMoE(Block):
    def __init__(self, config: ScMoE, site: Site) -> None:
        super().__init__()
        self.mixer_norm_0 = Norm(site.width, site.eps)
        self.mixer_0 = config.mixer.build(site)
        self.ffn_norm_0 = Norm(site.width, site.eps)
        self.moe = config.moe.build(site)
        self.dense_0 = config.dense.build(site)
        self.mixer_norm_1 = Norm(site.width, site.eps)
        self.mixer_1 = config.mixer.build(site)
        self.ffn_norm_1 = Norm(site.width, site.eps)
        self.dense_1 = config.dense.build(site)
        if any(mixer.lends or mixer.borrows for mixer in self.mixers()):
            raise ValueError(
                "ScMoE builds two mixers from one config, so neither can lend to the other; "
                "use PreNorm where layers share keys and values"
            )

    def mixers(self) -> tuple[Mixer, ...]:
        return (self.mixer_0, self.mixer_1)

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context,
        states: States | None,
        borrowed: Mapping[str, Tensor],
    ) -> BlockOutput:
        state_0, state_1 = (None, None) if states is None else states
        mixed_BTD, state_0, _ = self.mixer_0(self.mixer_norm_0(x_BTD), ctx, state_0, {})
        a_BTD = x_BTD + mixed_BTD
        h_BTD = self.ffn_norm_0(a_BTD)
        pending = self.moe.begin(h_BTD, ctx)
        y_BTD, stats_0 = self.dense_0(h_BTD, ctx)
        a_BTD = a_BTD + y_BTD
        mixed_BTD, state_1, _ = self.mixer_1(self.mixer_norm_1(a_BTD), ctx, state_1, {})
        a_BTD = a_BTD + mixed_BTD
        # The way there runs beside the first dense FFN and the attention, the way back beside this.
        pending = self.moe.compute(pending)
        y_BTD, stats_1 = self.dense_1(self.ffn_norm_1(a_BTD), ctx)
        moe_BTD, stats = self.moe.finish(pending)
        new_states = None if state_0 is None or state_1 is None else (state_0, state_1)
        # In the order the feed-forwards are declared; a dense FFN has none.
        all_stats = tuple(each for each in (stats, stats_0, stats_1) if each is not None)
        return BlockOutput(a_BTD + y_BTD + moe_BTD, new_states, {}, all_stats)
