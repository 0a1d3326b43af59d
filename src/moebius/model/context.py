"""The context of a forward: a frozen tree of tensors that says what the tokens are to each other.

Letters: B sequences, T tokens each. It is rebuilt, never edited; every part reads it, none writes.
"""

import dataclasses
from typing import Self

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Context:
    """Positions, documents and what a loss needs to know of the whole global batch."""

    position_BT: Tensor  # int64, position within the document
    document_BT: Tensor  # int64, changes where a document ends
    valid_BT: Tensor  # bool, False for padding: no loss, no load counted
    # bool, [query, key]: causal and within the document; keys are those of whole sequences.
    attend_BTT: Tensor
    place_T: Tensor  # int64, where in the sequence a token stands
    sequence_B: Tensor  # int64, index of the sequence in the whole run
    num_targets: Tensor  # scalar, valid targets of the GLOBAL batch: every loss is divided by it
    step: Tensor  # scalar int64, the training step (seeds what is random)

    @classmethod
    def packed(
        cls,
        position_BT: Tensor,
        document_BT: Tensor,
        valid_BT: Tensor,
        sequence_B: Tensor,
        num_targets: int,
        step: int,
    ) -> Self:
        """The context of packed sequences: attention is causal and never crosses documents."""
        length = position_BT.shape[1]
        device = position_BT.device
        causal_TT = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
        count = torch.tensor(num_targets, dtype=torch.float64).to(torch.float32)
        return cls(
            position_BT,
            document_BT,
            valid_BT,
            same_BTT & causal_TT,
            torch.arange(length, device=device),
            sequence_B,
            count.to(device),
            torch.tensor(step, device=device),
        )

    def at(self, place_T: Tensor) -> Self:
        """The same of some tokens of each sequence, which see the keys of all."""
        return dataclasses.replace(
            self,
            position_BT=self.position_BT[:, place_T],
            document_BT=self.document_BT[:, place_T],
            valid_BT=self.valid_BT[:, place_T],
            attend_BTT=self.attend_BTT[:, place_T],
            place_T=place_T,
        )

    @classmethod
    def continuing(cls, tokens_BT: Tensor, start: int) -> Self:
        """The context of `tokens_BT` as the continuation of a single document at `start`."""
        batch, length = tokens_BT.shape
        device = tokens_BT.device
        position_BT = torch.arange(start, start + length, device=device).expand(batch, length)
        return cls.packed(
            position_BT,
            torch.zeros_like(position_BT),
            torch.ones_like(position_BT, dtype=torch.bool),
            torch.arange(batch, device=device),
            batch * length,
            0,
        )
