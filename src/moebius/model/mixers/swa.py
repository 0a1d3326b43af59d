"""Sliding-window attention with optional learned sinks (gpt-oss), over grouped keys.

A token sees itself and the `window - 1` tokens before it. The decode state is a ring of that many.
Letters as in `gqa`.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from moebius.model.context import Context
from moebius.model.mixers import DecodeState, Mixer, MixerConfig
from moebius.model.mixers.cache import TokenCache
from moebius.model.mixers.gqa import GQA, QKV
from moebius.model.part import Site
from moebius.model.weight import Weight
from moebius.ops.attention import attention


@dataclasses.dataclass(frozen=True)
class SWA(MixerConfig):
    """Grouped-query attention over the last `window` tokens; `sinks` adds one logit a head."""

    heads: int
    kv_heads: int
    head_width: int
    window: int
    rope_base: float | None = 10_000.0
    qk_norm: bool = False
    sinks: bool = False

    def build(self, site: Site) -> Mixer:
        return _SWA(self, site)


class _SWA(Mixer):
    def __init__(self, config: SWA, site: Site) -> None:
        super().__init__()
        if config.window < 1:
            raise ValueError(f"window ({config.window}) must be at least 1: a token sees itself")
        self.config = config
        heads = GQA(
            config.heads, config.kv_heads, config.head_width, config.rope_base, config.qk_norm
        )
        self.qkv = QKV(heads, site)
        self.sink_H = Weight((config.heads,), "scalar") if config.sinks else None

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context,
        state: DecodeState | None,
        borrowed: Mapping[str, Tensor],
    ) -> tuple[Tensor, DecodeState | None, dict[str, Tensor]]:
        q_BTHK, k_BSGK, v_BSGK = self.qkv.project(x_BTD, ctx)
        length = x_BTD.shape[1]
        if state is None:
            index_T = torch.arange(length, device=x_BTD.device)
            near_TT = index_T[:, None] - index_T[None, :] < self.config.window
            mask_BTS = ctx.attend_BTT & near_TT
        else:
            assert isinstance(state, TokenCache)
            state = state.extend(k_BSGK, v_BSGK)
            k_BSGK, v_BSGK = state.entries
            mask_BTS = state.attend_BTS(length)
            state = state.trim()
        out_BTHK = attention(
            q_BTHK,
            k_BSGK,
            v_BSGK,
            mask_BTS,
            self.config.head_width**-0.5,
            self.sink_H,
            causal=state is None,
            window=self.config.window,
        )
        return self.qkv.back(out_BTHK), state, {}

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> DecodeState:
        shape = (batch, 0, self.config.kv_heads, self.config.head_width)
        empty = torch.empty(shape, dtype=dtype, device=device)
        return TokenCache((empty, empty), window=self.config.window)

    def flops(self, context: int) -> float:
        seen = min(context / 2, self.config.window)
        return 4.0 * self.config.heads * self.config.head_width * seen
