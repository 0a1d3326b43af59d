"""Sliding-window attention with optional learned sinks (gpt-oss), over grouped keys.

A token sees itself and the `window - 1` tokens before it. The decode state is a ring of that many.
Letters as in `gqa`.
"""

import dataclasses

from moebius.model.mixers import Mixer, MixerConfig
from moebius.model.mixers.gqa import GQA, Attention, QKNorm
from moebius.model.part import Site
from moebius.model.rope import RopeScaling


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
        return Attention(self.without_window(), self.window, site)

    def without_window(self) -> GQA:
        """The same attention over all tokens; ValueError for a window that sees nothing."""
        if self.window < 1:
            raise ValueError(f"window ({self.window}) must be at least 1: a token sees itself")
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(GQA)}
        return GQA(**values)
