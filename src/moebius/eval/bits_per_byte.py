"""Bits per byte on the held-out documents: every token once, end-of-document tokens counted.

The total negative log-likelihood in bits over the original bytes; comparable across tokenizers and
with a compressor's output.
"""

import dataclasses
import math

import torch

from moebius.data import Prepared, heldout_batches
from moebius.model.context import Context
from moebius.model.lm import LM


@dataclasses.dataclass(frozen=True)
class BitsPerByte:
    """The figure, and what it was taken over."""

    bits_per_byte: float
    loss: float
    num_tokens: int
    num_bytes: int


@torch.no_grad()
def bits_per_byte(
    lm: LM,
    prepared: Prepared,
    sequence_length: int,
    batch: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> BitsPerByte:
    """Evaluate on all held-out documents, packed as in training (attention within documents)."""
    was_training = lm.training
    lm.eval()
    total, num_tokens = 0.0, 0
    for part in heldout_batches(prepared, sequence_length, batch):
        rows = part.to(device)
        ctx = Context.packed(
            rows.position_BT,
            rows.document_BT,
            rows.valid_BT,
            rows.sequence_B,
            rows.num_targets,
            0,
        )
        loss = lm.loss(rows.tokens_BT, rows.targets_BT, ctx, dtype=dtype, with_ends=False)
        total += float(loss.total)
        num_tokens += int(rows.valid_BT.sum())
    lm.train(was_training)
    num_bytes = sum(source.shards.num_bytes for source in prepared.heldout)
    return BitsPerByte(total / math.log(2) / num_bytes, total / num_tokens, num_tokens, num_bytes)
