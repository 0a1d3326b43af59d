"""How published models stretch rotary positions beyond the length they were trained at.

A scaling changes the frequencies of the pairs, and may stretch the turned vectors (`size`) and the
attention scores (`score`). Sources: linear (Chen et al. 2306.15595), NTK with a fixed alpha
(Hunyuan), YaRN (Peng et al. 2309.00071; DeepSeek-V3 and gpt-oss), Llama 3.1. Letters: R rotated
width, P pairs.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from moebius.config import Variant
from moebius.ops.rope import frequencies, turn

TABLE = {
    "linear": "moebius.model.rope:Linear",
    "ntk_alpha": "moebius.model.rope:NTKAlpha",
    "yarn": "moebius.model.rope:YaRN",
    "llama3": "moebius.model.rope:Llama3",
}


@dataclasses.dataclass(frozen=True)
class RopeScaling(Variant, ABC):
    """The contract of a scaling."""

    TABLE: ClassVar[Mapping[str, str]] = TABLE
    SEAM: ClassVar[str] = "rope scaling"

    @abstractmethod
    def frequencies(self, width: int, base: float, like: Tensor) -> Tensor:
        """Radians per position of each pair: [P], at least fp32, where `like` is."""

    @property
    def size(self) -> float:
        """What turned queries and keys are multiplied by."""
        return 1.0

    @property
    def score(self) -> float:
        """What attention scores are multiplied by, where a mixer has such a factor (MLA)."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class Linear(RopeScaling):
    """Positions divided by `factor`."""

    factor: float

    def frequencies(self, width: int, base: float, like: Tensor) -> Tensor:
        return frequencies(width, base, like) / self.factor


@dataclasses.dataclass(frozen=True)
class NTKAlpha(RopeScaling):
    """The base times alpha^(R / (R - 2)), at any length: Hunyuan's "dynamic"."""

    alpha: float

    def frequencies(self, width: int, base: float, like: Tensor) -> Tensor:
        return frequencies(width, base * self.alpha ** (width / (width - 2)), like)


@dataclasses.dataclass(frozen=True)
class YaRN(RopeScaling):
    """Fast pairs keep their frequency, slow ones are divided by `factor`, a ramp lies between.

    A pair is fast if it turns more than `beta_fast` times within `original_length` positions, slow
    below `beta_slow`. `mscale` and `mscale_all_dim` are DeepSeek's: their ratio is the size, and
    the square of the second the factor of the scores.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def _pair_of(self, turns: float, width: int, base: float) -> float:
        """The index of the pair that turns this many times within the original length."""
        return width * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    def frequencies(self, width: int, base: float, like: Tensor) -> Tensor:
        plain_P = frequencies(width, base, like)
        first, last = (self._pair_of(t, width, base) for t in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        index_P = torch.arange(width // 2, device=plain_P.device, dtype=plain_P.dtype)
        slow_P = ((index_P - first) / max(last - first, 1e-3)).clamp(0, 1)
        return plain_P * (1 - slow_P) + plain_P / self.factor * slow_P

    def _mscale(self, weight: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

    @property
    def size(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    @property
    def score(self) -> float:
        return self._mscale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


@dataclasses.dataclass(frozen=True)
class Llama3(RopeScaling):
    """Llama 3.1: wavelengths beyond original_length / low_factor are stretched by `factor`, those
    within original_length / high_factor stay, and between them the two are mixed."""

    factor: float
    low_factor: float
    high_factor: float
    original_length: int

    def frequencies(self, width: int, base: float, like: Tensor) -> Tensor:
        plain_P = frequencies(width, base, like)
        turns_P = self.original_length * plain_P / (2 * math.pi)
        keep_P = ((turns_P - self.low_factor) / (self.high_factor - self.low_factor)).clamp(0, 1)
        return plain_P * keep_P + plain_P / self.factor * (1 - keep_P)


def rotated(
    x_BTHK: Tensor,
    position_BT: Tensor,
    base: float | None,
    scaling: RopeScaling | None,
    width: int | None = None,
) -> Tensor:
    """x_BTHK with its positions in it; no base is no positions at all (NoPE).

    Only the last `width` dims are turned, if that is given.
    """
    if base is None:
        return x_BTHK
    width = x_BTHK.shape[-1] if width is None else width
    if scaling is None:
        return turn(x_BTHK, position_BT, frequencies(width, base, x_BTHK))
    frequency_P = scaling.frequencies(width, base, x_BTHK)
    return turn(x_BTHK, position_BT, frequency_P, scaling.size)
