"""The parts of native sparse attention (NSA, arXiv 2502.11089, section 3.3) that hold no weights.

`blocks` attends to compressed keys and chooses blocks by what it saw; `selected_attention` attends
to the tokens of chosen blocks. `naive` is the truth, `dense` (a mask over all tokens) is in use on
every device but where the Triton kernel of flash-linear-attention is installed and fits (`fla`).
Letters: C compressed blocks, J selection blocks, X chosen blocks of a query; the rest as in
docs/letters.md.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from moebius.ops.nsa.blocks import choose_blocks, compressed_attention, importance
from moebius.ops.nsa.dense import selected_dense
from moebius.ops.nsa.fla import kernel_fits, selected_fla
from moebius.ops.nsa.naive import importance_naive, selected_naive

__all__ = [
    "choose",
    "choose_blocks",
    "compressed_attention",
    "importance",
    "importance_naive",
    "selected_attention",
    "selected_naive",
]

SelectedOp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, float], Tensor]

BACKENDS: dict[str, SelectedOp] = {
    "naive": selected_naive,
    "dense": selected_dense,
    "fla": selected_fla,
}


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("fla") is not None


def choose(
    device: torch.device, dtype: torch.dtype, group: int, head_width: int, width: int
) -> str:
    """The backend in use for whole sequences, by name, at H / G = group and blocks of `width`."""
    fits = device.type == "cuda" and kernel_fits(dtype, group, head_width, width)
    return "fla" if fits and _installed() else "dense"


def selected_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    index_BGTX: Tensor,
    position_BS: Tensor,
    attend_BTS: Tensor,
    width: int,
    scale: float,
    *,
    whole: bool,
) -> Tensor:
    """Attention of each query to the tokens of its chosen blocks, as far as attend_BTS lets it.

    Block j of a document holds its positions j * width to (j + 1) * width - 1; -1 in index_BGTX is
    no block. `whole` says that queries and keys are the same tokens. -> [B, T, H, K], dtype of q.
    """
    group, head_width = q_BTHK.shape[2] // k_BSGK.shape[2], q_BTHK.shape[3]
    fast = choose(q_BTHK.device, q_BTHK.dtype, group, head_width, width)
    op = BACKENDS[fast if whole else "dense"]
    return op(q_BTHK, k_BSGK, v_BSGK, index_BGTX, position_BS, attend_BTS, width, scale)
