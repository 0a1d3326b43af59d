"""A stage of a run: from an exact token count on, other sequences, rotary base or mixture.

Llama 3 grows 8K to 128K so, Hunyuan-Large goes to 32K and 256K with bases up to 1e9 (arXiv
2407.21783, 2411.02265); LongCat-Flash has a stage of 70% STEM and code (2509.01322, 3).
`train/sections.py` lays stages out in steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """What holds once `at_tokens` targets were trained on, until the next stage.

    `batch=None`: as many sequences as leave the tokens of a step as they are. `rope_base=None`:
    the base stays; else every mixer with rotary positions gets it. `weights`: the shares of the
    data's sources, one each, 0 for none; empty: those of the run.
    """

    at_tokens: int
    sequence_length: int
    batch: int | None = None
    rope_base: float | None = None
    weights: tuple[float, ...] = ()

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


def check_weights(first: Sequence[float], stages: Sequence[Stage], paths: Sequence[str]) -> None:
    """ValueError unless all weights fit the sources, and some stage draws from each of them."""
    later = {f"weights of stage {i}": stage.weights for i, stage in enumerate(stages, 1)}
    named = {"weights": first, **later}
    for name, weights in named.items():
        if weights and len(weights) != len(paths):
            raise ValueError(
                f"{name} must be one for each source of the data, {len(paths)}, not {len(weights)}"
            )
        if any(not 0 <= weight < math.inf for weight in weights) or (weights and not any(weights)):
            raise ValueError(f"{name} must be 0 or more and not all 0, not {list(weights)}")
    if first:
        idle = [path for i, path in enumerate(paths) if not any(w and w[i] for w in named.values())]
        if idle:
            raise ValueError(f"{idle[0]!r} has weight 0 from beginning to end; leave it out")
