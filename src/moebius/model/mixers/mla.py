"""Multi-head latent attention (DeepSeek-V2/V3) with LongCat-Flash's scale correction.

Keys and values are up-projections of one small latent per token. Training expands them (naive);
decoding keeps only the latent and the rotated key, and moves the up-projections to the query and
the output (absorbed): multi-query attention over latents. Letters: H heads, P nope width, R rope
width, V value width, C latent (kv) rank, Q query rank.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moebius.model.context import Context
from moebius.model.mixers import DecodeState, Mixer, MixerConfig
from moebius.model.mixers.cache import TokenCache
from moebius.model.mixers.logits import ScaleRows, max_logits, scale_rows
from moebius.model.part import Norm, Site
from moebius.model.rope import RopeScaling, rotated
from moebius.model.weight import Weight
from moebius.ops.attention import attention
from moebius.ops.linear import linear
from moebius.ops.ranks import Cut, Ranks, Spread, added, share, size_of
from moebius.ops.sequences import sequences


@dataclasses.dataclass(frozen=True)
class MLA(MixerConfig):
    """`rope_base=None` keeps the shared key but does not rotate it (NoPE, as Kimi Linear).

    `bias` adds one to the two down-projections and to the output, as in DeepSeek.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_width: int
    rope_width: int
    v_width: int
    rope_base: float | None = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    # LongCat-Flash eq. 6: q times sqrt(D / q_rank), latent times sqrt(D / kv_rank).
    scale_correction: bool = False
    latent_eps: float = 1e-6
    bias: bool = False

    def build(self, site: Site) -> Mixer:
        return _MLA(self, site)

    def check(self) -> None:
        """ValueError where widths or options do not fit each other."""
        if self.rope_base is not None and self.rope_width % 2:
            raise ValueError(f"rope_width ({self.rope_width}) must be even for rotary positions")
        if self.scale_correction and self.q_rank is None:
            raise ValueError("scale_correction needs q_rank: it aligns the query latent's variance")


def _by_head(config: MLA, site: Site, ranks: Ranks) -> Cut:
    """How up-projections are cut; ValueError where ranks would not have equal shares of heads."""
    if config.heads % (parts := size_of(ranks.tensor)):
        raise ValueError(
            f"layer {site.layer}: parallel.tp={parts} must divide its {config.heads} heads"
        )
    return Cut(ranks.tensor)


class Queries(nn.Module, Spread):
    """Queries out of the model width, by way of a latent if there is a q_rank."""

    def __init__(self, config: MLA, site: Site) -> None:
        super().__init__()
        self.config, self.site = config, site
        q_in = site.width if config.q_rank is None else config.q_rank
        q_out = config.heads * (config.nope_width + config.rope_width)
        self.w_qa = self.b_qa = self.q_norm = None
        if config.q_rank is not None:
            std = site.into(site.width)
            self.w_qa = Weight((config.q_rank, site.width), "matrix", std=std)
            self.b_qa = Weight((config.q_rank,), "bias") if config.bias else None
            self.q_norm = Norm(config.q_rank, config.latent_eps)
        # With the correction the latent arrives scaled to width D, so fan-in counts as D.
        std = site.into(site.width if config.scale_correction else q_in)
        self.w_qb = Weight((q_out, q_in), "matrix", std=std)

    def spread(self, ranks: Ranks) -> Mapping[str, Cut]:
        """Each rank of `ranks.tensor` has an equal share of the heads; the latent is of all."""
        return {"w_qb": _by_head(self.config, self.site, ranks)}

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """q_BTHX: P dims without positions, then R with them."""
        config, x_BTQ = self.config, x_BTD
        if self.w_qa is not None and self.q_norm is not None:
            x_BTQ = self.q_norm(linear(x_BTD, self.w_qa, self.b_qa))
        width = config.nope_width + config.rope_width
        q_BTHX = linear(x_BTQ, self.w_qb).unflatten(-1, (-1, width))
        rope = (config.rope_base, config.rope_scaling, config.rope_width)
        return rotated(q_BTHX, ctx.position_BT, *rope)

    def clip(self, gamma_H: Tensor, scale: ScaleRows) -> None:
        """Multiply queries without positions by sqrt(gamma): keys take the other half. Those with
        positions meet a key that all heads share, and take all of it."""
        widths = torch.tensor([self.config.nope_width, self.config.rope_width])
        both_H2 = torch.stack([gamma_H.sqrt(), gamma_H], dim=1)
        scale(self.w_qb, both_H2.repeat_interleave(widths.to(both_H2.device), dim=1))


class Latents(nn.Module, Spread):
    """The finished latent and rotated key of each token: what a cache keeps."""

    def __init__(self, config: MLA, site: Site) -> None:
        super().__init__()
        self.config, self.ranks = config, Ranks()
        width = config.kv_rank + config.rope_width
        self.w_kva = Weight((width, site.width), "matrix", std=site.into(site.width))
        self.b_kva = Weight((width,), "bias") if config.bias else None
        self.kv_norm = Norm(config.kv_rank, config.latent_eps)
        self.scale = (site.width / config.kv_rank) ** 0.5 if config.scale_correction else 1.0

    def spread(self, ranks: Ranks) -> Mapping[str, Cut]:
        """Every rank of a tensor group has the same latents; sequences are put together here."""
        self.ranks = ranks
        return {}

    def forward(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """c_BSC and k_BSR of tokens; of whole sequences, where ranks share them."""
        config = self.config
        widths = [config.kv_rank, config.rope_width]
        c_BTC, k_BTR = linear(x_BTD, self.w_kva, self.b_kva).split(widths, dim=-1)
        k_BT1R = k_BTR[:, :, None]
        k_BT1R = rotated(k_BT1R, ctx.position_BT, config.rope_base, config.rope_scaling)
        c_BTC, together = self.kv_norm(c_BTC) * self.scale, self.ranks.context
        return sequences(c_BTC, together), sequences(k_BT1R[:, :, 0], together)


class LatentHeads(nn.Module, Spread):
    """Heads that read latents through their own up-projections, and write to the model width."""

    def __init__(self, config: MLA, site: Site) -> None:
        super().__init__()
        self.config, self.site, self.ranks = config, site, Ranks()
        kv_out = config.heads * (config.nope_width + config.v_width)
        std = site.into(site.width if config.scale_correction else config.kv_rank)
        self.w_kvb = Weight((kv_out, config.kv_rank), "matrix", std=std)
        o_in = config.heads * config.v_width
        self.w_o = Weight((site.width, o_in), "matrix", std=site.back(o_in))
        self.b_o = Weight((site.width,), "bias") if config.bias else None
        stretch = 1.0 if config.rope_scaling is None else config.rope_scaling.score
        if config.scale_correction and config.q_rank is not None:
            # The correction of queries, where it costs nothing.
            stretch *= (site.width / config.q_rank) ** 0.5
        self.score_scale = (config.nope_width + config.rope_width) ** -0.5 * stretch

    def spread(self, ranks: Ranks) -> Mapping[str, Cut]:
        """Each rank of `ranks.tensor` has an equal share of the heads."""
        self.ranks = ranks
        by_head = _by_head(self.config, self.site, ranks)
        return {"w_kvb": by_head, "w_o": Cut(ranks.tensor, dim=1)}

    def naive(self, q_BTHX: Tensor, c_BSC: Tensor, k_BSR: Tensor, mask_BTS: Tensor) -> Tensor:
        """y_BTD of whole sequences: keys and values are expanded."""
        k_BSHX, v_BSHV = self._expanded(c_BSC, k_BSR)
        out_BTHV = attention(q_BTHX, k_BSHX, v_BSHV, mask_BTS, self.score_scale, causal=True)
        return self._out(out_BTHV)

    def _out(self, out_BTHV: Tensor) -> Tensor:
        b_o = share(self.b_o, self.ranks.tensor)
        return added(linear(out_BTHV.flatten(-2), self.w_o, b_o), self.ranks.tensor)

    def _expanded(self, c_BSC: Tensor, k_BSR: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (without positions, then with) and values of every head."""
        widths = [self.config.nope_width, self.config.v_width]
        kv_BSHX = linear(c_BSC, self.w_kvb).unflatten(-1, (-1, sum(widths)))
        k_BSHP, v_BSHV = kv_BSHX.split(widths, dim=-1)
        k_BSHR = k_BSR[:, :, None].expand(-1, -1, k_BSHP.shape[2], -1)
        return torch.cat([k_BSHP, k_BSHR], dim=-1), v_BSHV

    def max_logits(self, q_BTHX: Tensor, c_BSC: Tensor, k_BSR: Tensor, mask_BTS: Tensor) -> Tensor:
        """max_H of whole sequences."""
        return max_logits(q_BTHX, self._expanded(c_BSC, k_BSR)[0], mask_BTS, self.score_scale)

    def clip(self, gamma_H: Tensor, scale: ScaleRows) -> None:
        """Multiply the keys out of the latent by sqrt(gamma); values stay."""
        config = self.config
        widths = torch.tensor([config.nope_width, config.v_width])
        both_H2 = torch.stack([gamma_H.sqrt(), torch.ones_like(gamma_H)], dim=1)
        scale(self.w_kvb, both_H2.repeat_interleave(widths.to(both_H2.device), dim=1))

    def absorbed(self, q_BTHX: Tensor, c_BSC: Tensor, k_BSR: Tensor, mask_BTS: Tensor) -> Tensor:
        """y_BTD of tokens that continue cached latents, which stay as they are."""
        q_BTHP, q_BTHR = q_BTHX.split([self.config.nope_width, self.config.rope_width], dim=-1)
        widths = [self.config.nope_width, self.config.v_width]
        w_HXC = self.w_kvb.to(q_BTHP.dtype).unflatten(0, (-1, sum(widths)))
        w_key_HPC, w_value_HVC = w_HXC.split(widths, dim=1)
        q_BTHC = torch.einsum("bthp,hpc->bthc", q_BTHP, w_key_HPC)
        q_BTHX = torch.cat([q_BTHC, q_BTHR], dim=-1)
        k_BS1X = torch.cat([c_BSC, k_BSR], dim=-1)[:, :, None]
        mixed_BTHC = attention(q_BTHX, k_BS1X, c_BSC[:, :, None], mask_BTS, self.score_scale)
        return self._out(torch.einsum("bthc,hvc->bthv", mixed_BTHC, w_value_HVC))


def empty_latents(config: MLA, batch: int, dtype: torch.dtype, device: torch.device) -> TokenCache:
    """The cache of `batch` empty sequences: latents [B, 0, C] and rotated keys [B, 0, R]."""
    widths = (config.kv_rank, config.rope_width)
    return TokenCache(tuple(torch.empty(batch, 0, w, dtype=dtype, device=device) for w in widths))


class _MLA(Mixer):
    clippable = True

    def __init__(self, config: MLA, site: Site) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.queries = Queries(config, site)
        self.latents = Latents(config, site)
        self.heads = LatentHeads(config, site)

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context,
        state: DecodeState | None,
        borrowed: Mapping[str, Tensor],
    ) -> tuple[Tensor, DecodeState | None, dict[str, Tensor]]:
        q_BTHX = self.queries(x_BTD, ctx)
        c_BSC, k_BSR = self.latents(x_BTD, ctx)
        if state is None:
            return self.heads.naive(q_BTHX, c_BSC, k_BSR, ctx.attend_BTT), None, {}
        assert isinstance(state, TokenCache)
        state = state.extend(c_BSC, k_BSR)
        c_BSC, k_BSR = state.entries
        mask_BTS = state.attend_BTS(x_BTD.shape[1])
        return self.heads.absorbed(q_BTHX, c_BSC, k_BSR, mask_BTS), state, {}

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> DecodeState:
        return empty_latents(self.config, batch, dtype, device)

    def state_bytes(self, context: int, dtype: torch.dtype) -> int:
        return (self.config.kv_rank + self.config.rope_width) * context * dtype.itemsize

    def flops(self, context: int) -> float:
        widths = self.config.nope_width + self.config.rope_width + self.config.v_width
        return float(self.config.heads * widths * context)

    def max_logits(self, x_BTD: Tensor, ctx: Context, borrowed: Mapping[str, Tensor]) -> Tensor:
        q_BTHX, (c_BSC, k_BSR) = self.queries(x_BTD, ctx), self.latents(x_BTD, ctx)
        return self.heads.max_logits(q_BTHX, c_BSC, k_BSR, ctx.attend_BTT)

    def clip_logits(self, gamma_H: Tensor, scale: ScaleRows = scale_rows) -> None:
        self.queries.clip(gamma_H, scale)
        self.heads.clip(gamma_H, scale)
