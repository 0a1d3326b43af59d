"""Grouped-query attention (Ainslie et al. 2023) with rotary positions and optional QK-norm.

Llama 3, Qwen3, OLMoE, gpt-oss and Hunyuan-Large use it. Letters: D model width, H query heads, G
key and value heads, K head width. `rope_base=None` gives no positions at all (NoPE).
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from moebius.model.context import Context
from moebius.model.mixers import DecodeState, Mixer, MixerConfig
from moebius.model.mixers.cache import SLACK, TokenCache
from moebius.model.mixers.logits import ScaleRows, max_logits, scale_rows
from moebius.model.part import Norm, Site
from moebius.model.rope import RopeScaling, rotated
from moebius.model.weight import Weight
from moebius.ops.attention import attention
from moebius.ops.linear import linear
from moebius.ops.norm import rms_norm
from moebius.ops.ranks import Cut, Ranks, Spread, added, share, size_of
from moebius.ops.sequences import sequences

# Norms of queries and keys: none, of each head (Qwen3), of all heads at once (OLMoE), or of each
# head after the rotation (Hunyuan).
QKNorm = Literal["none", "head", "full", "head_after_rope"]


@dataclasses.dataclass(frozen=True)
class GQA(MixerConfig):
    """`heads` query heads over `kv_heads` key heads, each `head_width` wide.

    `bias` adds one to each of the four projections; `sinks` a learned logit to each head's softmax.
    """

    heads: int
    kv_heads: int
    head_width: int
    rope_base: float | None = 500_000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: QKNorm = "none"
    bias: bool = False
    sinks: bool = False

    def build(self, site: Site) -> Mixer:
        return Attention(self, None, site)

    def check(self) -> None:
        """ValueError where heads do not divide, or rotary pairs do not fit."""
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if self.rope_base is not None and self.head_width % 2:
            raise ValueError(f"head_width ({self.head_width}) must be even for rotary positions")


def _norm(config: GQA, heads: int, site: Site) -> nn.Module:
    if config.qk_norm == "none":
        return nn.Identity()
    if config.qk_norm == "full":
        return _FullNorm(config.head_width * heads, site.eps)
    return Norm(config.head_width, site.eps)


class _FullNorm(nn.Module, Spread):
    """RMSNorm of all heads at once, whoever has them."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.w_D = Weight((width,), "norm", constant=1.0)
        self.eps, self.ranks = eps, Ranks()

    def spread(self, ranks: Ranks) -> Mapping[str, Cut]:
        self.ranks = ranks
        return {"w_D": Cut(ranks.tensor)}

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.w_D, self.eps, self.ranks.tensor)


def _normed_and_rotated(x: Tensor, norm: nn.Module, config: GQA, ctx: Context) -> Tensor:
    """Queries or keys [B, T, heads * K] by head, normed and rotated in the order of `qk_norm`."""
    x = norm(x) if config.qk_norm == "full" else x
    x_BTHK = x.unflatten(-1, (-1, config.head_width))
    x_BTHK = norm(x_BTHK) if config.qk_norm == "head" else x_BTHK
    x_BTHK = rotated(x_BTHK, ctx.position_BT, config.rope_base, config.rope_scaling)
    return norm(x_BTHK) if config.qk_norm == "head_after_rope" else x_BTHK


def _attend_BTT(ctx: Context, window: int | None) -> Tensor:
    """Who sees whom in whole sequences: within a document, and no further back than the window."""
    if window is None:
        return ctx.attend_BTT
    place_S = torch.arange(ctx.attend_BTT.shape[2], device=ctx.place_T.device)
    return ctx.attend_BTT & (ctx.place_T[:, None] - place_S < window)


def _cuts(config: GQA, site: Site, ranks: Ranks) -> Cut:
    """How projections are cut by heads; ValueError where ranks would not have equal ones."""
    parts = size_of(ranks.tensor)
    if config.heads % parts or config.kv_heads % parts:
        raise ValueError(
            f"layer {site.layer}: parallel.tp={parts} must divide its {config.heads} heads and "
            f"{config.kv_heads} kv_heads"
        )
    return Cut(ranks.tensor)


class Heads(nn.Module, Spread):
    """Queries out of the model width, their attention, and what they saw back into it."""

    def __init__(self, config: GQA, site: Site) -> None:
        super().__init__()
        self.config, self.site, self.ranks = config, site, Ranks()
        width = config.heads * config.head_width
        self.w_q = Weight((width, site.width), "matrix", std=site.into(site.width))
        self.w_o = Weight((site.width, width), "matrix", std=site.back(width))
        self.b_q = Weight((width,), "bias") if config.bias else None
        self.b_o = Weight((site.width,), "bias") if config.bias else None
        self.q_norm = _norm(config, config.heads, site)
        self.sink_H = Weight((config.heads,), "scalar") if config.sinks else None

    def spread(self, ranks: Ranks) -> Mapping[str, Cut]:
        """Each rank of `ranks.tensor` has an equal share of the heads."""
        by_head, self.ranks = _cuts(self.config, self.site, ranks), ranks
        cuts = {"w_q": by_head, "w_o": Cut(ranks.tensor, dim=1)}
        for name, weight in (("b_q", self.b_q), ("sink_H", self.sink_H)):
            if weight is not None:
                cuts[name] = by_head
        return cuts

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context,
        entries: tuple[Tensor, ...],
        seen_BTS: Tensor | None,
        window: int | None,
    ) -> Tensor:
        """y_BTD from finished keys and values.

        `seen_BTS` says which of them each token may see, None that they are its whole sequences.
        """
        whole = seen_BTS is None
        mask_BTS = _attend_BTT(ctx, window) if seen_BTS is None else seen_BTS
        q_BTHK, (k_BSGK, v_BSGK) = self.queries(x_BTD, ctx), entries
        out_BTHK = attention(
            q_BTHK,
            k_BSGK,
            v_BSGK,
            mask_BTS,
            self.config.head_width**-0.5,
            self.sink_H,
            causal=whole,
            window=window,
        )
        b_o = share(self.b_o, self.ranks.tensor)
        return added(linear(out_BTHK.flatten(-2), self.w_o, b_o), self.ranks.tensor)

    def flops(self, context: int, window: int | None) -> float:
        """Of scores and values per token, over the causal half of the context or the window."""
        seen = context / 2 if window is None else min(context / 2, window)
        return 4.0 * self.config.heads * self.config.head_width * seen

    def queries(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """q_BTHK of tokens."""
        q = linear(x_BTD, self.w_q, self.b_q)
        return _normed_and_rotated(q, self.q_norm, self.config, ctx)

    @property
    def clippable(self) -> bool:
        """Whether nothing bounds the logits; a norm of queries and keys does."""
        return self.config.qk_norm == "none"

    def max_logits(self, x_BTD: Tensor, ctx: Context, k_BSGK: Tensor, window: int | None) -> Tensor:
        """max_H of whole sequences over finished keys."""
        q_BTHK, mask_BTS = self.queries(x_BTD, ctx), _attend_BTT(ctx, window)
        return max_logits(q_BTHK, k_BSGK, mask_BTS, self.config.head_width**-0.5)

    def clip(self, factor_H: Tensor, scale: ScaleRows) -> None:
        """Multiply the queries of each head."""
        for weight in (self.w_q, self.b_q):
            scale(weight, factor_H[:, None])


class KeysValues(nn.Module, Spread):
    """Finished keys (normed and rotated) and values: what a cache keeps."""

    def __init__(self, config: GQA, site: Site) -> None:
        super().__init__()
        self.config, self.site, self.ranks = config, site, Ranks()
        width, std = config.kv_heads * config.head_width, site.into(site.width)
        self.w_k = Weight((width, site.width), "matrix", std=std)
        self.w_v = Weight((width, site.width), "matrix", std=std)
        self.b_k = Weight((width,), "bias") if config.bias else None
        self.b_v = Weight((width,), "bias") if config.bias else None
        self.k_norm = _norm(config, config.kv_heads, site)

    def spread(self, ranks: Ranks) -> Mapping[str, Cut]:
        """Each rank of `ranks.tensor` has an equal share of the key and value heads."""
        self.ranks = ranks
        names = ("w_k", "w_v") if self.b_k is None else ("w_k", "w_v", "b_k", "b_v")
        return dict.fromkeys(names, _cuts(self.config, self.site, ranks))

    def forward(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """k_BSGK and v_BSGK of tokens; of whole sequences, where ranks share them."""
        k = linear(x_BTD, self.w_k, self.b_k)
        k_BTGK = _normed_and_rotated(k, self.k_norm, self.config, ctx)
        v_BTGK = linear(x_BTD, self.w_v, self.b_v).unflatten(-1, (-1, self.config.head_width))
        return sequences(k_BTGK, self.ranks.context), sequences(v_BTGK, self.ranks.context)

    def clip(self, factor_G: Tensor, scale: ScaleRows) -> None:
        """Multiply the keys of each key head."""
        for weight in (self.w_k, self.b_k):
            scale(weight, factor_G[:, None])


def empty_cache(
    config: GQA, batch: int, dtype: torch.dtype, device: torch.device, window: int | None = None
) -> TokenCache:
    """The cache of `batch` empty sequences: keys and values [B, 0, G, K]."""
    shape = (batch, 0, config.kv_heads, config.head_width)
    empty = torch.empty(shape, dtype=dtype, device=device)
    return TokenCache((empty, empty), window=window)


class Attention(Mixer):
    """The mixer of GQA, over all tokens before or over a window of the last."""

    def __init__(self, config: GQA, window: int | None, site: Site) -> None:
        super().__init__()
        config.check()
        self.config, self.window = config, window
        self.heads = Heads(config, site)
        self.kv = KeysValues(config, site)
        self.clippable = self.heads.clippable

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context,
        state: DecodeState | None,
        borrowed: Mapping[str, Tensor],
    ) -> tuple[Tensor, DecodeState | None, dict[str, Tensor]]:
        entries, seen_BTS = self.kv(x_BTD, ctx), None
        if state is not None:
            assert isinstance(state, TokenCache)
            state = state.extend(*entries)
            entries, seen_BTS = state.entries, state.attend_BTS(x_BTD.shape[1])
            state = state.trim()
        return self.heads(x_BTD, ctx, entries, seen_BTS, self.window), state, {}

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> DecodeState:
        return empty_cache(self.config, batch, dtype, device, self.window)

    def state_bytes(self, context: int, dtype: torch.dtype) -> int:
        kept = context if self.window is None else min(context, self.window + SLACK)
        return 2 * self.config.kv_heads * self.config.head_width * kept * dtype.itemsize

    def flops(self, context: int) -> float:
        return self.heads.flops(context, self.window)

    def max_logits(self, x_BTD: Tensor, ctx: Context, borrowed: Mapping[str, Tensor]) -> Tensor:
        return self.heads.max_logits(x_BTD, ctx, self.kv(x_BTD, ctx)[0], self.window)

    def clip_logits(self, gamma_H: Tensor, scale: ScaleRows = scale_rows) -> None:
        # Query heads that share a key head cannot each scale it: their queries take it all.
        if self.config.kv_heads < self.config.heads:
            self.heads.clip(gamma_H, scale)
            return
        self.heads.clip(gamma_H.sqrt(), scale)
        self.kv.clip(gamma_H.sqrt(), scale)
