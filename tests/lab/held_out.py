"""An evaluation for tests, as a user writes one: the held-out loss alone."""

from typing import Any

import torch

from moebius.data.prepared import Prepared
from moebius.eval.bits_per_byte import Heldout, bits_per_byte
from moebius.model.lm import LM


def held_out(
    model: LM,
    prepared: Prepared,
    *,
    sequence_length: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    write: object,
) -> dict[str, Any]:
    """The held-out loss alone."""
    model.eval()
    found = bits_per_byte(model, Heldout(prepared, sequence_length, batch, dtype, device))
    return {"val_loss": found.loss, "val_bits_per_byte": found.bits_per_byte}
