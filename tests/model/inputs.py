"""Inputs of the model's tests: noise, packed contexts, tokens and their targets."""

import dataclasses

import torch
from torch import Tensor

from moebius.model.context import Context


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def context(*rows: tuple[int, ...], padded: int = 0, step: int = 0) -> Context:
    """Packed sequences, each given by the lengths of its documents; the last tokens are padding."""
    position = [[i for length in row for i in range(length)] for row in rows]
    document = [[d for d, length in enumerate(row) for _ in range(length)] for row in rows]
    valid_BT = torch.ones(len(rows), sum(rows[0]), dtype=torch.bool)
    valid_BT[:, sum(rows[0]) - padded :] = False
    return Context.packed(
        torch.tensor(position),
        torch.tensor(document),
        valid_BT,
        torch.arange(len(rows)),
        int(valid_BT.sum()),
        step,
    )


def rows_of(ctx: Context, rows: slice) -> Context:
    """A micro-batch of a context: the count of targets stays that of the whole."""
    whole = {"place_T", "num_targets", "step"}
    names = [field.name for field in dataclasses.fields(ctx) if field.name not in whole]
    return dataclasses.replace(ctx, **{name: getattr(ctx, name)[rows] for name in names})


def tokens(batch: int, length: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """tokens_BT and targets_BT, the tokens one further on."""
    generator = torch.Generator().manual_seed(seed)
    all_BX = torch.randint(0, vocab, (batch, length + 1), generator=generator)
    return all_BX[:, :-1], all_BX[:, 1:]
