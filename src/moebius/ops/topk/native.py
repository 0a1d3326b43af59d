"""Top-k of short rows as a CPU kernel: k passes over a row in registers and first-level cache.

It is an operator of torch's dispatcher, so that recompute can keep what was selected.
"""

from pathlib import Path

import torch
from torch import Tensor

from moebius.ops.native import address, integer, library, missing, threads

SOURCE = Path(__file__).with_name("native.cpp")
# A pass for each that is taken: past these, sorting does better.
MOST, WIDEST = 32, 4096


def fits(x_NE: Tensor, k: int) -> bool:
    """Whether the kernel takes these values on this machine."""
    fp32 = x_NE.device.type == "cpu" and x_NE.dtype == torch.float32 and x_NE.ndim == 2
    short = fp32 and 1 <= k <= min(MOST, x_NE.shape[1]) and x_NE.shape[1] <= WIDEST
    return short and missing() is None


@torch.library.custom_op("moebius::topk", mutates_args=(), device_types="cpu")
def _topk(x_NE: Tensor, k: int) -> Tensor:
    x_NE = x_NE.contiguous()
    index_NS = x_NE.new_empty(len(x_NE), k, dtype=torch.int64)
    sizes = map(integer, (*x_NE.shape, k))
    library(SOURCE).topk(address(x_NE), address(index_NS), *sizes, threads())
    return index_NS


def topk_native(x_NE: Tensor, k: int) -> Tensor:
    """See `moebius.ops.topk.topk`. fp32 rows of at most 4,096 values, k of at most 32."""
    return _topk(x_NE.detach(), k)
