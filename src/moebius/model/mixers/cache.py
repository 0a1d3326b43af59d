"""The decode state of attention: what each seen token left behind, all of it or a ring of the last.

Letters: B sequences, S kept tokens. A ring keeps its window and `SLACK` tokens more, the reach of a
rollback (speculative drafts are shorter).
"""

import dataclasses
from typing import Self

import torch
from torch import Tensor

from moebius.model.mixers import DecodeState

SLACK = 16


@dataclasses.dataclass(frozen=True)
class TokenCache(DecodeState):
    """Per-token tensors [B, S, ...] of the last S of `seen` tokens."""

    entries: tuple[Tensor, ...]
    seen: int = 0
    window: int | None = None

    @property
    def length(self) -> int:
        return self.seen

    @property
    def bytes(self) -> int:
        return sum(entry.numel() * entry.element_size() for entry in self.entries)

    @property
    def kept(self) -> int:
        return self.entries[0].shape[1]

    def snapshot(self) -> Self:
        return self

    def rollback(self, num_tokens: int) -> Self:
        reach = self.seen
        if self.window is not None and self.kept < self.seen:
            reach = self.kept - self.window  # a turned ring still needs its window afterwards
        if not 0 <= num_tokens <= reach:
            raise ValueError(f"cannot roll back {num_tokens} tokens; at most {reach} here")
        entries = tuple(entry[:, : self.kept - num_tokens] for entry in self.entries)
        return dataclasses.replace(self, entries=entries, seen=self.seen - num_tokens)

    def extend(self, *new: Tensor) -> Self:
        """The cache with new tokens [B, T, ...] after the old, nothing forgotten yet."""
        pairs = zip(self.entries, new, strict=True)
        entries = tuple(torch.cat([old, entry], dim=1) for old, entry in pairs)
        return dataclasses.replace(self, entries=entries, seen=self.seen + new[0].shape[1])

    def trim(self) -> Self:
        """Forget what lies beyond the window (and its slack)."""
        if self.window is None or self.kept <= self.window + SLACK:
            return self
        entries = tuple(entry[:, -(self.window + SLACK) :].clone() for entry in self.entries)
        return dataclasses.replace(self, entries=entries)

    def attend_BTS(self, num_queries: int) -> Tensor:
        """Which kept tokens the last `num_queries` of them may see: causal, within the window."""
        entry = self.entries[0]
        key_S = torch.arange(self.seen - self.kept, self.seen, device=entry.device)
        distance_TS = key_S[-num_queries:, None] - key_S[None, :]
        mask_TS = distance_TS >= 0
        if self.window is not None:
            mask_TS = mask_TS & (distance_TS < self.window)
        return mask_TS.expand(entry.shape[0], -1, -1)
