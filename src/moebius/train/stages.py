"""A stage of a run: from an exact token count on, longer sequences and another rotary base.

Llama 3 grows 8K to 128K so, Hunyuan-Large goes to 32K and 256K with bases up to 1e9 (arXiv
2407.21783, 2411.02265). `train/sections.py` lays stages out in steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """What holds once `at_tokens` targets were trained on, until the next stage.

    `batch=None`: as many sequences as leave the tokens of a step as they are. `rope_base=None`:
    the base stays; else every mixer with rotary positions gets it.
    """

    at_tokens: int
    sequence_length: int
    batch: int | None = None
    rope_base: float | None = None

    def __post_init__(self) -> None:
        for name in ("at_tokens", "sequence_length", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} of a stage must be at least 1, not {value}")
        if self.rope_base is not None and not 1 < self.rope_base < math.inf:
            raise ValueError(f"rope_base of a stage must be above 1, not {self.rope_base}")


def check_rising(stages: Sequence[Stage]) -> None:
    """ValueError unless every stage begins after the one before it."""
    begins = [stage.at_tokens for stage in stages]
    if begins != sorted(set(begins)):
        raise ValueError(f"the at_tokens of the stages must rise, not {begins}")
