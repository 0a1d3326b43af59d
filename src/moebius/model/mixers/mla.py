"""Multi-head latent attention (DeepSeek-V2/V3) with LongCat-Flash's scale correction.

Keys and values are up-projections of one small latent per token. Training expands them (naive);
decoding keeps only the latent and the rotated key, and moves the up-projections to the query and
the output (absorbed): multi-query attention over latents. Letters: H heads, P nope width, R rope
width, V value width, C latent (kv) rank, Q query rank.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from moebius.model.context import Context
from moebius.model.mixers import DecodeState, Mixer, MixerConfig
from moebius.model.mixers.cache import TokenCache
from moebius.model.part import Norm, Site
from moebius.model.weight import Weight
from moebius.ops.attention import attention
from moebius.ops.linear import linear
from moebius.ops.rope import rotate


@dataclasses.dataclass(frozen=True)
class MLA(MixerConfig):
    """`rope_base=None` keeps the shared key but does not rotate it (NoPE, as Kimi Linear)."""

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_width: int
    rope_width: int
    v_width: int
    rope_base: float | None = 1_000_000.0
    # LongCat-Flash eq. 6: q times sqrt(D / q_rank), latent times sqrt(D / kv_rank).
    scale_correction: bool = False
    latent_eps: float = 1e-6

    def build(self, site: Site) -> Mixer:
        return _MLA(self, site)


class _MLA(Mixer):
    def __init__(self, config: MLA, site: Site) -> None:
        super().__init__()
        if config.rope_base is not None and config.rope_width % 2:
            raise ValueError(f"rope_width ({config.rope_width}) must be even for rotary positions")
        if config.scale_correction and config.q_rank is None:
            raise ValueError("scale_correction needs q_rank: it aligns the query latent's variance")
        self.config = config
        q_in = site.width if config.q_rank is None else config.q_rank
        q_out = config.heads * (config.nope_width + config.rope_width)
        kv_out = config.heads * (config.nope_width + config.v_width)
        latent_out = config.kv_rank + config.rope_width
        self.w_qa = self.q_norm = None
        if config.q_rank is not None:
            std = site.into(site.width)
            self.w_qa = Weight((config.q_rank, site.width), "matrix", std=std)
            self.q_norm = Norm(config.q_rank, config.latent_eps)
        # With the correction the latents arrive scaled to width D, so fan-in counts as D.
        aligned = config.scale_correction
        q_std = site.into(site.width if aligned else q_in)
        kv_std = site.into(site.width if aligned else config.kv_rank)
        self.w_qb = Weight((q_out, q_in), "matrix", std=q_std)
        self.w_kva = Weight((latent_out, site.width), "matrix", std=site.into(site.width))
        self.kv_norm = Norm(config.kv_rank, config.latent_eps)
        self.w_kvb = Weight((kv_out, config.kv_rank), "matrix", std=kv_std)
        o_in = config.heads * config.v_width
        self.w_o = Weight((site.width, o_in), "matrix", std=site.back(o_in))
        self.q_scale = (site.width / q_in) ** 0.5 if aligned else 1.0
        self.kv_scale = (site.width / config.kv_rank) ** 0.5 if aligned else 1.0
        self.score_scale = (config.nope_width + config.rope_width) ** -0.5

    def _queries(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        x_BTQ = x_BTD
        if self.w_qa is not None and self.q_norm is not None:
            x_BTQ = self.q_norm(linear(x_BTD, self.w_qa))
        q_BTHX = linear(x_BTQ, self.w_qb).unflatten(-1, (self.config.heads, -1)) * self.q_scale
        widths = [self.config.nope_width, self.config.rope_width]
        q_BTHP, q_BTHR = q_BTHX.split(widths, dim=-1)
        return q_BTHP, self._rotate(q_BTHR, ctx)

    def _latents(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        widths = [self.config.kv_rank, self.config.rope_width]
        c_BTC, k_BTR = linear(x_BTD, self.w_kva).split(widths, dim=-1)
        k_BT1R = self._rotate(k_BTR[:, :, None], ctx)
        return self.kv_norm(c_BTC) * self.kv_scale, k_BT1R[:, :, 0]

    def _rotate(self, x_BTHR: Tensor, ctx: Context) -> Tensor:
        base = self.config.rope_base
        return x_BTHR if base is None else rotate(x_BTHR, ctx.position_BT, base)

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context,
        state: DecodeState | None,
        borrowed: Mapping[str, Tensor],
    ) -> tuple[Tensor, DecodeState | None, dict[str, Tensor]]:
        q_BTHP, q_BTHR = self._queries(x_BTD, ctx)
        c_BTC, k_BTR = self._latents(x_BTD, ctx)
        if state is None:
            out_BTHV = self._naive(q_BTHP, q_BTHR, c_BTC, k_BTR, ctx.attend_BTT)
        else:
            assert isinstance(state, TokenCache)
            state = state.extend(c_BTC, k_BTR)
            mask_BTS = state.attend_BTS(x_BTD.shape[1])
            c_BSC, k_BSR = state.entries
            out_BTHV = self._absorbed(q_BTHP, q_BTHR, c_BSC, k_BSR, mask_BTS)
        return linear(out_BTHV.flatten(-2), self.w_o), state, {}

    def _naive(
        self, q_BTHP: Tensor, q_BTHR: Tensor, c_BSC: Tensor, k_BSR: Tensor, mask_BTS: Tensor
    ) -> Tensor:
        heads = self.config.heads
        kv_BSHX = linear(c_BSC, self.w_kvb).unflatten(-1, (heads, -1))
        k_BSHP, v_BSHV = kv_BSHX.split([self.config.nope_width, self.config.v_width], dim=-1)
        k_BSHR = k_BSR[:, :, None].expand(-1, -1, heads, -1)
        q_BTHX = torch.cat([q_BTHP, q_BTHR], dim=-1)
        k_BSHX = torch.cat([k_BSHP, k_BSHR], dim=-1)
        return attention(q_BTHX, k_BSHX, v_BSHV, mask_BTS, self.score_scale, causal=True)

    def _absorbed(
        self, q_BTHP: Tensor, q_BTHR: Tensor, c_BSC: Tensor, k_BSR: Tensor, mask_BTS: Tensor
    ) -> Tensor:
        w_HXC = self.w_kvb.to(q_BTHP.dtype).unflatten(0, (self.config.heads, -1))
        w_key_HPC, w_value_HVC = w_HXC.split([self.config.nope_width, self.config.v_width], dim=1)
        q_BTHC = torch.einsum("bthp,hpc->bthc", q_BTHP, w_key_HPC)
        q_BTHX = torch.cat([q_BTHC, q_BTHR], dim=-1)
        k_BS1X = torch.cat([c_BSC, k_BSR], dim=-1)[:, :, None]
        mixed_BTHC = attention(q_BTHX, k_BS1X, c_BSC[:, :, None], mask_BTS, self.score_scale)
        return torch.einsum("bthc,hvc->bthv", mixed_BTHC, w_value_HVC)

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> DecodeState:
        widths = (self.config.kv_rank, self.config.rope_width)
        empty = [torch.empty(batch, 0, width, dtype=dtype, device=device) for width in widths]
        return TokenCache(tuple(empty))

    def flops(self, context: int) -> float:
        widths = self.config.nope_width + self.config.rope_width + self.config.v_width
        return float(self.config.heads * widths * context)
