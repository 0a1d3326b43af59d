"""Cross-layer attention (CLA, Brandon et al. 2405.12981): layers in a row share keys and values.

The first layer of a group computes them, finished (normed and rotated), and lends them; the others
have only their queries and outputs. Over MLA what is lent are latents and rotated keys, which each
layer expands by itself. Only the lender keeps a cache: a group of f layers keeps 1/f of the bytes.
Hunyuan-Large uses f = 2 over GQA. Letters as in `gqa` and `mla`.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from moebius.config import spec_of
from moebius.model.context import Context
from moebius.model.mixers import DecodeState, Mixer, MixerConfig
from moebius.model.mixers.cache import SLACK, TokenCache
from moebius.model.mixers.gqa import GQA, Heads, KeysValues, empty_cache
from moebius.model.mixers.logits import ScaleRows, scale_rows
from moebius.model.mixers.mla import MLA, LatentHeads, Latents, Queries, empty_latents
from moebius.model.mixers.swa import SWA
from moebius.model.part import Site


@dataclasses.dataclass(frozen=True)
class CLA(MixerConfig):
    """The attention `of` (gqa, swa or mla), lending its keys and values, or borrowing them.

    The nearest earlier lender is borrowed from. Heads may differ within a group; what is shared
    may not (kv heads, widths, positions, window).
    """

    of: MixerConfig
    borrows: bool = False

    def build(self, site: Site) -> Mixer:
        reader = _reader(self.of, site)
        return _Borrower(reader) if self.borrows else _Lender(reader, _writer(self.of, site))


def shared(of: MixerConfig, factor: int) -> tuple[CLA, ...]:
    """The mixers of a group of `factor` layers: one that lends, the others borrow from it."""
    if factor < 1:
        raise ValueError(f"a group shares keys and values among 1 layer or more, not {factor}")
    return (CLA(of), *(factor - 1) * (CLA(of, borrows=True),))


class _Reader(nn.Module, ABC):
    """What every layer of a group has for itself: queries out of the model width, heads back."""

    # The two tensors that are shared, and what they are.
    names: tuple[str, str]
    loan: Mapping[str, Any]
    window: int | None = None
    clippable: bool

    @abstractmethod
    def forward(
        self, x_BTD: Tensor, ctx: Context, entries: tuple[Tensor, ...], seen_BTS: Tensor | None
    ) -> Tensor:
        """y_BTD from the shared tensors; `seen_BTS` is None for whole sequences in training."""

    @abstractmethod
    def empty(self, batch: int, dtype: torch.dtype, device: torch.device) -> TokenCache:
        """The cache of the shared tensors, before any token."""

    @abstractmethod
    def flops(self, context: int) -> float:
        """As of a mixer."""

    @abstractmethod
    def max_logits(self, x_BTD: Tensor, ctx: Context, entries: tuple[Tensor, ...]) -> Tensor:
        """max_H of whole sequences, from the shared tensors."""

    @abstractmethod
    def clip(self, gamma_H: Tensor, scale: ScaleRows) -> None:
        """Shrink the logits of each head by its gamma; what is shared stays as it is."""


class _HeadsReader(_Reader):
    names = ("keys", "values")

    def __init__(self, config: GQA, window: int | None, site: Site) -> None:
        super().__init__()
        config.check()
        self.config, self.window = config, window
        self.heads = Heads(config, site)
        self.clippable = self.heads.clippable
        alike = ("kv_heads", "head_width", "rope_base", "rope_scaling")
        self.loan = {**{name: getattr(config, name) for name in alike}, "window": window}

    def forward(
        self, x_BTD: Tensor, ctx: Context, entries: tuple[Tensor, ...], seen_BTS: Tensor | None
    ) -> Tensor:
        return self.heads(x_BTD, ctx, entries, seen_BTS, self.window)

    def empty(self, batch: int, dtype: torch.dtype, device: torch.device) -> TokenCache:
        return empty_cache(self.config, batch, dtype, device, self.window)

    def flops(self, context: int) -> float:
        return self.heads.flops(context, self.window)

    def max_logits(self, x_BTD: Tensor, ctx: Context, entries: tuple[Tensor, ...]) -> Tensor:
        return self.heads.max_logits(x_BTD, ctx, entries[0], self.window)

    def clip(self, gamma_H: Tensor, scale: ScaleRows) -> None:
        self.heads.clip(gamma_H, scale)


class _LatentsReader(_Reader):
    names = ("latents", "rotated_keys")
    clippable = True

    def __init__(self, config: MLA, site: Site) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.queries = Queries(config, site)
        self.heads = LatentHeads(config, site)
        alike = ("kv_rank", "rope_width", "rope_base", "rope_scaling", "scale_correction")
        self.loan = {name: getattr(config, name) for name in alike}

    def forward(
        self, x_BTD: Tensor, ctx: Context, entries: tuple[Tensor, ...], seen_BTS: Tensor | None
    ) -> Tensor:
        q_BTHX, (c_BSC, k_BSR) = self.queries(x_BTD, ctx), entries
        if seen_BTS is None:
            return self.heads.naive(q_BTHX, c_BSC, k_BSR, ctx.attend_BTT)
        return self.heads.absorbed(q_BTHX, c_BSC, k_BSR, seen_BTS)

    def empty(self, batch: int, dtype: torch.dtype, device: torch.device) -> TokenCache:
        return empty_latents(self.config, batch, dtype, device)

    def flops(self, context: int) -> float:
        widths = self.config.nope_width + self.config.rope_width + self.config.v_width
        return float(self.config.heads * widths * context)

    def max_logits(self, x_BTD: Tensor, ctx: Context, entries: tuple[Tensor, ...]) -> Tensor:
        q_BTHX, (c_BSC, k_BSR) = self.queries(x_BTD, ctx), entries
        return self.heads.max_logits(q_BTHX, c_BSC, k_BSR, ctx.attend_BTT)

    def clip(self, gamma_H: Tensor, scale: ScaleRows) -> None:
        self.queries.clip(gamma_H, scale)
        self.heads.clip(gamma_H, scale)


def _reader(of: MixerConfig, site: Site) -> _Reader:
    if isinstance(of, GQA):
        return _HeadsReader(of, None, site)
    if isinstance(of, SWA):
        return _HeadsReader(of.without_window(), of.window, site)
    if isinstance(of, MLA):
        return _LatentsReader(of, site)
    name = spec_of(type(of), of.TABLE)
    raise ValueError(f"CLA shares the keys and values of gqa, swa or mla, not of {name}")


def _writer(of: MixerConfig, site: Site) -> nn.Module:
    if isinstance(of, MLA):
        return Latents(of, site)
    config = of.without_window() if isinstance(of, SWA) else of
    assert isinstance(config, GQA)
    return KeysValues(config, site)


class _Lender(Mixer):
    def __init__(self, reader: _Reader, writer: nn.Module) -> None:
        super().__init__()
        self.reader, self.writer = reader, writer
        self.lends, self.loan = reader.names, reader.loan
        self.clippable = reader.clippable

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context,
        state: DecodeState | None,
        borrowed: Mapping[str, Tensor],
    ) -> tuple[Tensor, DecodeState | None, dict[str, Tensor]]:
        entries, seen_BTS = self.writer(x_BTD, ctx), None
        if state is not None:
            assert isinstance(state, TokenCache)
            state = state.extend(*entries)
            entries, seen_BTS = state.entries, state.attend_BTS(x_BTD.shape[1])
            state = state.trim()
        y_BTD = self.reader(x_BTD, ctx, entries, seen_BTS)
        return y_BTD, state, dict(zip(self.lends, entries, strict=True))

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> DecodeState:
        return self.reader.empty(batch, dtype, device)

    def state_bytes(self, context: int, dtype: torch.dtype) -> int:
        empty = self.reader.empty(1, dtype, torch.device("meta"))
        kept = context if empty.window is None else min(context, empty.window + SLACK)
        return kept * dtype.itemsize * sum(math.prod(entry.shape[2:]) for entry in empty.entries)

    def flops(self, context: int) -> float:
        return self.reader.flops(context)

    def max_logits(self, x_BTD: Tensor, ctx: Context, borrowed: Mapping[str, Tensor]) -> Tensor:
        return self.reader.max_logits(x_BTD, ctx, self.writer(x_BTD, ctx))

    def clip_logits(self, gamma_H: Tensor, scale: ScaleRows = scale_rows) -> None:
        self.reader.clip(gamma_H, scale)


@dataclasses.dataclass(frozen=True)
class Counted(DecodeState):
    """The state of a borrower: it counts tokens and holds none, its lender does."""

    seen: int = 0

    @property
    def length(self) -> int:
        return self.seen

    @property
    def bytes(self) -> int:
        return 0

    def snapshot(self) -> Self:
        return self

    def rollback(self, num_tokens: int) -> Self:
        if not 0 <= num_tokens <= self.seen:
            raise ValueError(f"cannot roll back {num_tokens} tokens; at most {self.seen} here")
        return dataclasses.replace(self, seen=self.seen - num_tokens)


class _Borrower(Mixer):
    def __init__(self, reader: _Reader) -> None:
        super().__init__()
        self.reader = reader
        self.borrows, self.loan = reader.names, reader.loan
        self.clippable = reader.clippable

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context,
        state: DecodeState | None,
        borrowed: Mapping[str, Tensor],
    ) -> tuple[Tensor, DecodeState | None, dict[str, Tensor]]:
        entries, seen_BTS = tuple(borrowed[name] for name in self.borrows), None
        if state is not None:
            assert isinstance(state, Counted)
            num_new = x_BTD.shape[1]
            state = Counted(state.seen + num_new)
            lent = TokenCache(entries, state.seen, self.reader.window)
            seen_BTS = lent.attend_BTS(num_new)
        return self.reader(x_BTD, ctx, entries, seen_BTS), state, {}

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> DecodeState:
        return Counted()

    def state_bytes(self, context: int, dtype: torch.dtype) -> int:
        return 0

    def flops(self, context: int) -> float:
        return self.reader.flops(context)

    def max_logits(self, x_BTD: Tensor, ctx: Context, borrowed: Mapping[str, Tensor]) -> Tensor:
        return self.reader.max_logits(x_BTD, ctx, tuple(borrowed[name] for name in self.borrows))

    def clip_logits(self, gamma_H: Tensor, scale: ScaleRows = scale_rows) -> None:
        self.reader.clip(gamma_H, scale)
