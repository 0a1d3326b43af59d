"""Masked attention with optional learned sinks; grouped keys and unequal widths allowed.

`naive` writes out the softmax; `sdpa` is torch's scaled_dot_product_attention, in use on every
device.
"""

from moebius.ops.attention.naive import attention_naive
from moebius.ops.attention.sdpa import attention

__all__ = ["attention", "attention_naive"]
