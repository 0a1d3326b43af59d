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
from moebius.model.mixers.cache import SLACK, TokenCache
from moebius.model.mixers.gqa import GQA, Heads, KeysValues, QKNorm, empty_cache
from moebius.model.part import Site
from moebius.model.rope import RopeScaling
from moebius.model.weight import Weight
from moebius.ops.attention import attention


@dataclasses.dataclass(frozen=True)
class SWA(MixerConfig):
    """Grouped-query attention over the last `window` tokens; the rest as in `GQA`."""

    heads: int
    kv_heads: int
    head_width: int
    window: int
    rope_base: float | None = 10_000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: QKNorm = "none"
    bias: bool = False
    sinks: bool = False

    def build(self, site: Site) -> Mixer:
        return _SWA(self, site)

    def without_window(self) -> GQA:
        """The same attention over all tokens."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(GQA)}
        return GQA(**values)


class _SWA(Mixer):
    def __init__(self, config: SWA, site: Site) -> None:
        super().__init__()
        if config.window < 1:
            raise ValueError(f"window ({config.window}) must be at least 1: a token sees itself")
        self.config, self.full = config, config.without_window()
        self.full.check()
        self.heads = Heads(self.full, site)
        self.kv = KeysValues(self.full, site)
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
        return self.heads.back(out_BTHK), state, {}

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> DecodeState:
        return empty_cache(self.full, batch, dtype, device, self.config.window)

    def state_bytes(self, context: int, dtype: torch.dtype) -> int:
        kept = min(context, self.config.window + SLACK)
        return 2 * self.config.kv_heads * self.config.head_width * kept * dtype.itemsize

    def flops(self, context: int) -> float:
        seen = min(context / 2, self.config.window)
        return 4.0 * self.config.heads * self.config.head_width * seen
