"""Cross-entropy of a linear head, without ever holding the N x V logits.

`chunked` computes loss and gradients in one pass over chunks of tokens; `naive` is the truth.
"""

from moebius.ops.loss.chunked import head_cross_entropy
from moebius.ops.loss.naive import head_cross_entropy_naive

__all__ = ["head_cross_entropy", "head_cross_entropy_naive"]
