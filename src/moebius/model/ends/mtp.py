"""Multi-token prediction (DeepSeek-V3 2.2; LongCat-Flash 2.4): one more token ahead, by a dense
layer.

z_t = W [norm(emb(token_{t+1})); norm(h_t)] goes through one pre-norm block and its own final norm
to the shared head, and predicts token_{t+2}. Depth k repeats it on its own output. Predictions
never cross a document. Letters: B T tokens, D width.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moebius.model.block.prenorm import PreNorm
from moebius.model.context import Context
from moebius.model.ends import End, EndConfig
from moebius.model.ends.head import Embedding, Head
from moebius.model.ffn import FeedForwardConfig
from moebius.model.ffn.routers import Router
from moebius.model.mixers import MixerConfig
from moebius.model.part import Norm, Site
from moebius.model.weight import Weight
from moebius.ops.inject import inject
from moebius.ops.linear import linear
from moebius.ops.ranks import Cut, Ranks, Spread
from moebius.ops.sequences import own_places, sequences


@dataclasses.dataclass(frozen=True)
class MTP(EndConfig):
    """`depth` extra tokens, their losses weighted by `weight` each."""

    mixer: MixerConfig
    ffn: FeedForwardConfig
    depth: int = 1
    weight: float = 0.1

    def build(self, site: Site) -> End:
        if self.depth < 1:
            raise ValueError(f"MTP depth ({self.depth}) must be at least 1")
        return _MTP(self, site)


class _Step(nn.Module):
    def __init__(self, config: MTP, site: Site) -> None:
        super().__init__()
        self.token_norm = Norm(site.width, site.eps)
        self.hidden_norm = Norm(site.width, site.eps)
        shape = (site.width, 2 * site.width)
        self.w_join = Weight(shape, "matrix", std=site.into(2 * site.width))
        self.block = PreNorm(config.mixer, config.ffn).build(site)
        self.norm = Norm(site.width, site.eps)
        if any(isinstance(module, Router) for module in self.modules()):
            raise ValueError(
                "the ffn of MTP must not have a router: nothing would balance its load"
            )


class _MTP(End, Spread):
    def __init__(self, config: MTP, site: Site) -> None:
        super().__init__()
        self.config, self.ranks = config, Ranks()
        self.steps = nn.ModuleList(_Step(config, site) for _ in range(config.depth))

    def spread(self, ranks: Ranks) -> Mapping[str, Cut]:
        """Targets further ahead are those of other ranks, where these share sequences."""
        self.ranks = ranks
        return {}

    def forward(
        self, hidden_BTD: Tensor, targets_BT: Tensor, ctx: Context, embed: Embedding, head: Head
    ) -> tuple[Tensor, dict[str, Tensor]]:
        h_BTD, out_BTD = hidden_BTD, hidden_BTD
        next_BT, valid_BT = targets_BT, ctx.valid_BT
        sums: dict[str, Tensor] = {}
        for depth, step in enumerate(self.steps, start=1):
            assert isinstance(step, _Step)
            token_BTD = step.token_norm(embed(next_BT, hidden_BTD.dtype))
            pair_BTX = torch.cat([token_BTD, step.hidden_norm(h_BTD)], dim=-1)
            h_BTD = step.block(linear(pair_BTX, step.w_join), ctx, None, {}).x_BTD
            next_BT, valid_BT = self._ahead(targets_BT, ctx, valid_BT, depth)
            total = head.cross_entropy(step.norm(h_BTD), next_BT, valid_BT)
            out_BTD = inject(out_BTD, self.config.weight * total / ctx.num_targets)
            sums[f"mtp_{depth}"] = total.detach()
            sums[f"mtp_{depth}_targets"] = valid_BT.sum()
        return out_BTD, sums

    def _ahead(
        self, targets_BT: Tensor, ctx: Context, valid_BT: Tensor, depth: int
    ) -> tuple[Tensor, Tensor]:
        """Targets `depth` further on, and where they lie in the same document and window."""
        sharers = self.ranks.context
        targets_BS, documents_BS, valid_BS = (
            sequences(x_BT, sharers) for x_BT in (targets_BT, ctx.document_BT, ctx.valid_BT)
        )
        ahead_BS = torch.roll(targets_BS, -depth, dims=1)
        inside_BS = torch.roll(documents_BS, -depth, dims=1) == documents_BS
        inside_BS &= torch.roll(valid_BS, -depth, dims=1)
        inside_BS[:, -depth:] = False
        ahead_BT, inside_BT = (
            own_places(x_BS, ctx.place_T, sharers) for x_BS in (ahead_BS, inside_BS)
        )
        return ahead_BT, valid_BT & inside_BT
