"""Newton-Schulz with each matrix on one core, from start to end in its cache, for bf16.

`step_native` is all of Muon's step around it: it reads and writes every fp32 tensor once.
M matrices in a stack, R rows, C columns, both multiples of 32.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moebius.ops.native import address, integer, library, real, threads
from moebius.ops.orthogonal.naive import Iteration

SOURCE = Path(__file__).with_name("native.cpp")


class Stack(NamedTuple):
    """Matrices of one weight, in fp32 and contiguous, and how far each moves along its update."""

    weight_MRC: Tensor
    grad_MRC: Tensor
    momentum_MRC: Tensor
    rate: float


def orthogonal_native(x_MRC: Tensor, iteration: Iteration) -> Tensor:
    """See `moebius.ops.orthogonal.orthogonal_`. bf16."""
    polynomials = torch.tensor(iteration.polynomials, dtype=torch.float64)
    library(SOURCE).orthogonal(
        address(x_MRC), *map(integer, x_MRC.shape), *_arguments(iteration, polynomials), threads()
    )
    return x_MRC


def step_native(
    stacks: Sequence[Stack],
    iteration: Iteration,
    *,
    keep: float,
    momentum: float,
    nesterov: bool,
) -> None:
    """m <- lerp(m, g, 1 - momentum), w <- keep * w - rate * orthogonal(direction), in place."""
    # The largest first, so that all threads end at about the same time.
    ordered = sorted(stacks, key=lambda stack: -math.prod(stack.weight_MRC.shape[1:]))
    rows = [[*(address(x).value for x in stack[:3]), *stack.weight_MRC.shape] for stack in ordered]
    table = torch.tensor(rows)
    rates = torch.tensor([stack.rate for stack in ordered], dtype=torch.float64)
    polynomials = torch.tensor(iteration.polynomials, dtype=torch.float64)
    library(SOURCE).muon(
        address(table),
        address(rates),
        integer(len(table)),
        real(keep),
        real(momentum),
        integer(nesterov),
        *_arguments(iteration, polynomials),
        threads(),
    )


def _arguments(iteration: Iteration, polynomials: Tensor) -> tuple[object, ...]:
    return (
        address(polynomials),
        integer(len(polynomials)),
        integer(iteration.bound == "frobenius"),
        real(iteration.margin),
        real(iteration.eps),
    )
