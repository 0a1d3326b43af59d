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
from moebius.model.mixers.cache import TokenCache
from moebius.model.part import Norm, Site
from moebius.model.rope import RopeScaling, rotated
from moebius.model.weight import Weight
from moebius.ops.attention import attention
from moebius.ops.linear import linear

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
        return _GQA(self, site)

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
    return Norm(config.head_width * (heads if config.qk_norm == "full" else 1), site.eps)


def _normed_and_rotated(x: Tensor, norm: nn.Module, config: GQA, ctx: Context) -> Tensor:
    """Queries or keys [B, T, heads * K] by head, normed and rotated in the order of `qk_norm`."""
    x = norm(x) if config.qk_norm == "full" else x
    x_BTHK = x.unflatten(-1, (-1, config.head_width))
    x_BTHK = norm(x_BTHK) if config.qk_norm == "head" else x_BTHK
    x_BTHK = rotated(x_BTHK, ctx.position_BT, config.rope_base, config.rope_scaling)
    return norm(x_BTHK) if config.qk_norm == "head_after_rope" else x_BTHK


class Heads(nn.Module):
    """Queries out of the model width, normed and rotated; and what heads saw back into it."""

    def __init__(self, config: GQA, site: Site) -> None:
        super().__init__()
        self.config = config
        width = config.heads * config.head_width
        self.w_q = Weight((width, site.width), "matrix", std=site.into(site.width))
        self.w_o = Weight((site.width, width), "matrix", std=site.back(width))
        self.b_q = Weight((width,), "bias") if config.bias else None
        self.b_o = Weight((site.width,), "bias") if config.bias else None
        self.q_norm = _norm(config, config.heads, site)

    def queries(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """q_BTHK of tokens."""
        q = linear(x_BTD, self.w_q, self.b_q)
        return _normed_and_rotated(q, self.q_norm, self.config, ctx)

    def back(self, out_BTHK: Tensor) -> Tensor:
        """Heads to the model width."""
        return linear(out_BTHK.flatten(-2), self.w_o, self.b_o)


class KeysValues(nn.Module):
    """Finished keys (normed and rotated) and values: what a cache keeps."""

    def __init__(self, config: GQA, site: Site) -> None:
        super().__init__()
        self.config = config
        width, std = config.kv_heads * config.head_width, site.into(site.width)
        self.w_k = Weight((width, site.width), "matrix", std=std)
        self.w_v = Weight((width, site.width), "matrix", std=std)
        self.b_k = Weight((width,), "bias") if config.bias else None
        self.b_v = Weight((width,), "bias") if config.bias else None
        self.k_norm = _norm(config, config.kv_heads, site)

    def forward(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """k_BTGK and v_BTGK of tokens."""
        k = linear(x_BTD, self.w_k, self.b_k)
        k_BTGK = _normed_and_rotated(k, self.k_norm, self.config, ctx)
        v_BTGK = linear(x_BTD, self.w_v, self.b_v).unflatten(-1, (-1, self.config.head_width))
        return k_BTGK, v_BTGK


def empty_cache(
    config: GQA, batch: int, dtype: torch.dtype, device: torch.device, window: int | None = None
) -> TokenCache:
    """The cache of `batch` empty sequences: keys and values [B, 0, G, K]."""
    shape = (batch, 0, config.kv_heads, config.head_width)
    empty = torch.empty(shape, dtype=dtype, device=device)
    return TokenCache((empty, empty), window=window)


class _GQA(Mixer):
    def __init__(self, config: GQA, site: Site) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.heads = Heads(config, site)
        self.kv = KeysValues(config, site)
        self.sink_H = Weight((config.heads,), "scalar") if config.sinks else None

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context,
        state: DecodeState | None,
        borrowed: Mapping[str, Tensor],
    ) -> tuple[Tensor, DecodeState | None, dict[str, Tensor]]:
        q_BTHK = self.heads.queries(x_BTD, ctx)
        k_BSGK, v_BSGK = self.kv(x_BTD, ctx)
        mask_BTS = ctx.attend_BTT
        if state is not None:
            assert isinstance(state, TokenCache)
            state = state.extend(k_BSGK, v_BSGK)
            k_BSGK, v_BSGK = state.entries
            mask_BTS = state.attend_BTS(x_BTD.shape[1])
        scale, whole = self.config.head_width**-0.5, state is None
        out_BTHK = attention(q_BTHK, k_BSGK, v_BSGK, mask_BTS, scale, self.sink_H, causal=whole)
        return self.heads.back(out_BTHK), state, {}

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> DecodeState:
        return empty_cache(self.config, batch, dtype, device)

    def state_bytes(self, context: int, dtype: torch.dtype) -> int:
        return 2 * self.config.kv_heads * self.config.head_width * context * dtype.itemsize

    def flops(self, context: int) -> float:
        # Scores and values over the causal half of the context: 2 products x 2 FLOPs / 2.
        return 2.0 * self.config.heads * self.config.head_width * context
