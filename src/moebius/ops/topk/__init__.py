"""The indices of each row's k largest values, largest first: what a router selects.

`naive` is torch's; `native` is the CPU kernel for fp32, which takes the first of equal values.
Letters: N rows, E values of a row, S taken.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moebius.ops.topk.naive import topk_naive
from moebius.ops.topk.native import fits, topk_native

__all__ = ["BACKENDS", "OPERATORS", "choose", "topk"]

BACKENDS: dict[str, Callable[[Tensor, int], Tensor]] = {"naive": topk_naive, "native": topk_native}

# What the backends are to torch's dispatcher.
OPERATORS: tuple[Any, ...] = (torch.ops.aten.topk.default, torch.ops.moebius.topk.default)


def choose(x_NE: Tensor, k: int) -> str:
    """The backend in use for these values, by name."""
    return "native" if fits(x_NE, k) else "naive"


def topk(x_NE: Tensor, k: int) -> Tensor:
    """index_NS (int64) of the k largest values of each row, a NaN being larger than all."""
    return BACKENDS[choose(x_NE, k)](x_NE, k)
