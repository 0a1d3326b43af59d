"""Masked attention with optional learned sinks; grouped keys and unequal widths allowed.

`naive` writes out the softmax; `sdpa` is torch's scaled_dot_product_attention, for any device and
dtype; `native` is a fused kernel in C++, the fast path in bf16 on a CPU that has what it needs.
Letters: B batch, T queries, S keys, H query heads, G key heads, K and V widths of keys and values.
"""

import torch
from torch import Tensor

from moebius.ops.attention.naive import attention_naive
from moebius.ops.attention.native import attention_native
from moebius.ops.attention.sdpa import attention_sdpa
from moebius.ops.native import missing

__all__ = ["attention", "attention_naive", "choose"]

# The kernel computes tiles of 64 queries; steps of decoding have a few.
FEWEST_QUERIES = 32


def choose(device: torch.device, dtype: torch.dtype, queries: int) -> str:
    """The backend in use for so many queries a sequence, by name."""
    if device.type != "cpu" or dtype != torch.bfloat16 or queries < FEWEST_QUERIES:
        return "sdpa"
    return "sdpa" if missing() else "native"


def attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    mask_BTS: Tensor,
    scale: float,
    sink_H: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """softmax(scale * q k + mask) v, per head: -> [B, T, H, V] in the dtype of q.

    `mask_BTS` is boolean, True where a query may look; `sink_H` adds exp(sink) to each denominator.
    `causal` promises that a square mask never looks ahead, `window` that it never looks further
    back than that; both only save work.
    """
    if choose(q_BTHK.device, q_BTHK.dtype, q_BTHK.shape[1]) == "native":
        # The kernel finds out by itself which tiles of the mask nobody sees.
        return attention_native(q_BTHK, k_BSGK, v_BSGV, mask_BTS, scale, sink_H)
    inputs = (q_BTHK, k_BSGK, v_BSGV, mask_BTS)
    return attention_sdpa(*inputs, scale, sink_H, causal=causal, window=window)
