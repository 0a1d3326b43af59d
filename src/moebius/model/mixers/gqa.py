"""Grouped-query attention (Ainslie et al. 2023) with rotary positions and optional QK-norm.

Llama 3 and Hunyuan-Large use it. Letters: D model width, H query heads, G key and value heads, K
head width. `rope_base=None` gives no positions at all (NoPE).
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moebius.model.context import Context
from moebius.model.mixers import DecodeState, Mixer, MixerConfig
from moebius.model.mixers.cache import TokenCache
from moebius.model.part import Norm, Site
from moebius.model.weight import Weight
from moebius.ops.attention import attention
from moebius.ops.linear import linear
from moebius.ops.rope import rotate


@dataclasses.dataclass(frozen=True)
class GQA(MixerConfig):
    """`heads` query heads over `kv_heads` key heads, each `head_width` wide."""

    heads: int
    kv_heads: int
    head_width: int
    rope_base: float | None = 500_000.0
    qk_norm: bool = False

    def build(self, site: Site) -> Mixer:
        return _GQA(self, site)


def check_heads(config: "GQA") -> None:
    """ValueError where heads do not divide, or rotary pairs do not fit."""
    if config.kv_heads < 1 or config.heads % config.kv_heads:
        raise ValueError(
            f"heads ({config.heads}) must be a multiple of kv_heads ({config.kv_heads})"
        )
    if config.rope_base is not None and config.head_width % 2:
        raise ValueError(f"head_width ({config.head_width}) must be even for rotary positions")


class QKV(nn.Module):
    """Projections to queries, keys and values, normalised and rotated; and back."""

    def __init__(self, config: GQA, site: Site) -> None:
        super().__init__()
        check_heads(config)
        self.config = config
        query_width = config.heads * config.head_width
        kv_width = config.kv_heads * config.head_width
        std = site.into(site.width)
        self.w_q = Weight((query_width, site.width), "matrix", std=std)
        self.w_k = Weight((kv_width, site.width), "matrix", std=std)
        self.w_v = Weight((kv_width, site.width), "matrix", std=std)
        self.w_o = Weight((site.width, query_width), "matrix", std=site.back(query_width))
        self.q_norm = Norm(config.head_width, site.eps) if config.qk_norm else nn.Identity()
        self.k_norm = Norm(config.head_width, site.eps) if config.qk_norm else nn.Identity()

    def project(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """q_BTHK, k_BTGK, v_BTGK of tokens; norms come before the rotation."""
        head_width, base = self.config.head_width, self.config.rope_base
        q_BTHK = self.q_norm(linear(x_BTD, self.w_q).unflatten(-1, (-1, head_width)))
        k_BTGK = self.k_norm(linear(x_BTD, self.w_k).unflatten(-1, (-1, head_width)))
        v_BTGK = linear(x_BTD, self.w_v).unflatten(-1, (-1, head_width))
        if base is not None:
            q_BTHK = rotate(q_BTHK, ctx.position_BT, base)
            k_BTGK = rotate(k_BTGK, ctx.position_BT, base)
        return q_BTHK, k_BTGK, v_BTGK

    def back(self, out_BTHK: Tensor) -> Tensor:
        """Heads to the model width."""
        return linear(out_BTHK.flatten(-2), self.w_o)


class _GQA(Mixer):
    def __init__(self, config: GQA, site: Site) -> None:
        super().__init__()
        self.config = config
        self.qkv = QKV(config, site)

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context,
        state: DecodeState | None,
        borrowed: Mapping[str, Tensor],
    ) -> tuple[Tensor, DecodeState | None, dict[str, Tensor]]:
        q_BTHK, k_BSGK, v_BSGK = self.qkv.project(x_BTD, ctx)
        mask_BTS = ctx.attend_BTT
        if state is not None:
            assert isinstance(state, TokenCache)
            state = state.extend(k_BSGK, v_BSGK)
            k_BSGK, v_BSGK = state.entries
            mask_BTS = state.attend_BTS(x_BTD.shape[1])
        scale = self.config.head_width**-0.5
        out_BTHK = attention(q_BTHK, k_BSGK, v_BSGK, mask_BTS, scale, causal=state is None)
        return self.qkv.back(out_BTHK), state, {}

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> DecodeState:
        shape = (batch, 0, self.config.kv_heads, self.config.head_width)
        empty = torch.empty(shape, dtype=dtype, device=device)
        return TokenCache((empty, empty))

    def flops(self, context: int) -> float:
        # Scores and values over the causal half of the context: 2 products x 2 FLOPs / 2.
        return 2.0 * self.config.heads * self.config.head_width * context
