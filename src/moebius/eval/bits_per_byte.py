"""Bits per byte on the held-out documents: every token once, end-of-document tokens counted.

The total negative log-likelihood in bits over the original bytes; comparable across tokenizers and
with a compressor's output.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from moebius.data.loader import heldout_batches
from moebius.data.prepared import Prepared
from moebius.model.context import Context
from moebius.model.lm import LM


@dataclasses.dataclass(frozen=True)
class Heldout:
    """How held-out documents are read: packed as in training, in a dtype, on a device."""

    prepared: Prepared
    sequence_length: int
    batch: int
    dtype: torch.dtype
    device: torch.device

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Context]]:
        """(tokens_BT, targets_BT, context) until every held-out token was a target once."""
        for part in heldout_batches(self.prepared, self.sequence_length, self.batch):
            rows = part.to(self.device)
            fields = (rows.position_BT, rows.document_BT, rows.valid_BT, rows.sequence_B)
            yield rows.tokens_BT, rows.targets_BT, Context.packed(*fields, rows.num_targets, 0)


@dataclasses.dataclass(frozen=True)
class BitsPerByte:
    """The figure, and what it was taken over."""

    bits_per_byte: float
    loss: float
    num_tokens: int
    num_bytes: int


@torch.no_grad()
def bits_per_byte(model: LM, heldout: Heldout) -> BitsPerByte:
    """Evaluate a model (in evaluation mode) on all held-out documents."""
    total, num_tokens = 0.0, 0
    for tokens_BT, targets_BT, ctx in heldout.batches():
        loss = model.loss(tokens_BT, targets_BT, ctx, dtype=heldout.dtype, with_ends=False)
        total += float(loss.total)
        num_tokens += int(ctx.valid_BT.sum())
    num_bytes = sum(source.shards.num_bytes for source in heldout.prepared.heldout)
    return BitsPerByte(total / math.log(2) / num_bytes, total / num_tokens, num_tokens, num_bytes)
