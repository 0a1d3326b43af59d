"""Muon (Jordan et al. 2024): momentum, made orthogonal by Newton-Schulz, as the update of a matrix.

Options from later work: Polar Express coefficients (arXiv 2505.16932), update RMS matched to
AdamW's (Moonlight, arXiv 2502.16982), NorMuon's second moment per row (arXiv 2510.05491), cautious
weight decay (arXiv 2510.12402). Matrices of equal shape, experts included, go through Newton-Schulz
together. M matrices in a stack, R rows, C columns, R <= C once transposed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from moebius.ops.orthogonal import Iteration, Stack, choose, orthogonal_, step_native
from moebius.optim.orthogonal import polar_iteration, quintic_iteration
from moebius.optim.rules import (
    Rule,
    Slot,
    State,
    check_betas,
    check_eps,
    decay_,
    matrix_shape,
    state_dtype,
)

# Elements that go through Newton-Schulz at once, on a CPU such that they stay in its caches.
PIECE, PIECE_ACCELERATOR = 1 << 20, 1 << 24


class Matrices(NamedTuple):
    """A weight, its gradient and state as stacks of matrices; views, but for the gradient."""

    weight_MRC: Tensor
    grad_MRC: Tensor
    momentum_MRC: Tensor
    second_MR1: Tensor | None

    def part(self, start: int, stop: int) -> "Matrices":
        """The matrices from `start` to `stop`."""
        second = None if self.second_MR1 is None else self.second_MR1[start:stop]
        return Matrices(
            self.weight_MRC[start:stop],
            self.grad_MRC[start:stop],
            self.momentum_MRC[start:stop],
            second,
        )


@dataclass(frozen=True)
class Muon(Rule):
    """Muon for weights [out, in] and [E, out, in], each divided into its slot's blocks.

    Polar Express takes 5 steps (published), 4 (a fifth less time, about as exact as 5 of quintic),
    or more. `scale` multiplies the orthogonal update: match_rms by 0.2*sqrt(max(rows, cols)),
    original by sqrt(max(1, rows/cols)), spectral by sqrt(rows/cols). `compute` is the dtype of
    Newton-Schulz alone: bf16 is twice as fast as fp32 on a CPU that multiplies in it, and the
    update is only nearly orthogonal in either. Momentum and weights are fp32; fp64 weights have
    everything in fp64.
    """

    MATRICES: ClassVar[bool] = True

    momentum: float = 0.95
    nesterov: bool = True
    steps: int = 5
    eps: float = 1e-7
    coefficients: Literal["polar_express", "quintic"] = "polar_express"
    scale: Literal["match_rms", "original", "spectral"] = "match_rms"
    normalise: Literal["none", "normuon"] = "none"
    beta2: float = 0.95
    cautious: bool = False
    compute: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self) -> None:
        check_betas({"momentum": self.momentum, "beta2": self.beta2})
        check_eps(self.eps)
        fewest = 4 if self.coefficients == "polar_express" else 1
        if self.steps < fewest:
            raise ValueError(f"steps={self.steps}: {self.coefficients} needs at least {fewest}")

    def init(self, slots: Sequence[Slot], params: Sequence[Tensor]) -> list[State]:
        states: list[State] = []
        for slot, param in zip(slots, params, strict=True):
            matrix_shape("muon", slot, param)
            state = {"momentum": torch.zeros_like(param, dtype=state_dtype(param))}
            if self.normalise == "normuon":
                state["row_moment"] = torch.zeros_like(param[..., :1], dtype=state_dtype(param))
            states.append(state)
        return states

    @torch.no_grad()
    def update(
        self,
        slots: Sequence[Slot],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        *,
        lr: float,
        weight_decay: float,
        step: int,
        total_steps: int,
    ) -> None:
        rows = zip(slots, params, grads, states, strict=True)
        weights = [_matrices(*row) for row in rows]
        fused: list[Matrices] = []
        others: list[Matrices] = []
        for weight in weights:
            (fused if self._fuses(weight) else others).append(weight)
        if fused:
            self._step_native(fused, lr, weight_decay)
        for piece in _pieces(others):
            updates = self._orthogonal(piece).split([len(part.weight_MRC) for part in piece])
            for part, update_MRC in zip(piece, updates, strict=True):
                self._apply(part, update_MRC, lr, weight_decay)

    def _fuses(self, weight: Matrices) -> bool:
        """Whether the native kernel has all of this weight's step."""
        fp32 = all(x.dtype == torch.float32 for x in (weight.weight_MRC, weight.momentum_MRC))
        plain = self.normalise == "none" and not self.cautious
        backend = choose(weight.weight_MRC, self._compute_dtype(weight.momentum_MRC))
        return fp32 and plain and weight.momentum_MRC.is_contiguous() and backend == "native"

    def _step_native(self, weights: Sequence[Matrices], lr: float, weight_decay: float) -> None:
        stacks = [
            Stack(
                weight.weight_MRC,
                weight.grad_MRC.to(weight.weight_MRC.dtype).contiguous(),
                weight.momentum_MRC,
                lr * self._scale(*weight.weight_MRC.shape[-2:]),
            )
            for weight in weights
        ]
        keep = 1 - lr * weight_decay
        step_native(
            stacks,
            self._iteration(),
            keep=keep,
            momentum=self.momentum,
            nesterov=self.nesterov,
        )

    def _iteration(self) -> Iteration:
        if self.coefficients == "quintic":
            return quintic_iteration(self.steps, self.eps)
        return polar_iteration(self.steps, self.eps)

    def _orthogonal(self, piece: Sequence[Matrices]) -> Tensor:
        """The orthogonal update of all matrices of a piece, in the dtype of Newton-Schulz."""
        like = piece[0].momentum_MRC
        stack_MRC = like.new_empty(
            sum(len(part.weight_MRC) for part in piece),
            *like.shape[-2:],
            dtype=self._compute_dtype(like),
        )
        places = stack_MRC.split([len(part.weight_MRC) for part in piece])
        for part, place in zip(piece, places, strict=True):
            place.copy_(self._momentum(part))
        return orthogonal_(stack_MRC, self._iteration())

    def _momentum(self, part: Matrices) -> Tensor:
        """Move the momentum; the direction it gives, not to be written."""
        grad = part.grad_MRC.to(part.momentum_MRC.dtype)
        part.momentum_MRC.lerp_(grad, 1 - self.momentum)
        return grad.lerp(part.momentum_MRC, self.momentum) if self.nesterov else part.momentum_MRC

    def _compute_dtype(self, update: Tensor) -> torch.dtype:
        if self.compute == "bf16" and update.dtype != torch.float64:
            return torch.bfloat16
        return update.dtype

    def _apply(self, part: Matrices, update_MRC: Tensor, lr: float, weight_decay: float) -> None:
        """Move the weights of a part along `update_MRC`."""
        weight_MRC = part.weight_MRC
        if part.second_MR1 is not None:
            update_MRC = update_MRC.to(weight_MRC.dtype)
            _equalise_rows(update_MRC, part.second_MR1, self.beta2, self.eps)
        decay_(weight_MRC, update_MRC, lr * weight_decay, self.cautious)
        weight_MRC.add_(update_MRC, alpha=-lr * self._scale(*weight_MRC.shape[-2:]))

    def width_exponent(self) -> float:
        """1/2 for match_rms, 0 for the others.

        What must stay as it is when all widths grow by s is the spectral norm of the update, times
        sqrt(cols/rows). An orthogonal matrix has 1; match_rms multiplies it by 0.2*sqrt(width).
        """
        return 0.5 if self.scale == "match_rms" else 0.0

    def _scale(self, rows: int, cols: int) -> float:
        if self.scale == "match_rms":
            return 0.2 * math.sqrt(max(rows, cols))
        return math.sqrt(max(1.0, rows / cols) if self.scale == "original" else rows / cols)


def _matrices(slot: Slot, param: Tensor, grad: Tensor, state: State) -> Matrices:
    shape = matrix_shape("muon", slot, param)
    second = state.get("row_moment")
    return Matrices(
        param.view(shape),
        grad.reshape(shape),
        state["momentum"].view(shape),
        None if second is None else second.view(-1, shape[1], 1),
    )


def _pieces(weights: Sequence[Matrices]) -> Iterator[list[Matrices]]:
    """All matrices, in pieces of one shape, dtype and device, and of bounded size."""
    groups: dict[tuple[object, ...], list[Matrices]] = {}
    for weight in weights:
        tensor = weight.weight_MRC
        key = (*tensor.shape[-2:], tensor.dtype, tensor.device)
        groups.setdefault(key, []).append(weight)
    for group in groups.values():
        _, rows, cols = group[0].weight_MRC.shape
        size = PIECE if group[0].weight_MRC.device.type == "cpu" else PIECE_ACCELERATOR
        most = max(1, size // (rows * cols))
        piece: list[Matrices] = []
        room = most
        for weight in group:
            start, end = 0, len(weight.weight_MRC)
            while start < end:
                stop = min(end, start + room)
                piece.append(weight.part(start, stop))
                start, room = stop, room - (stop - start)
                if room == 0:
                    yield piece
                    piece, room = [], most
        if piece:
            yield piece


def _equalise_rows(update_MRC: Tensor, second_MR1: Tensor, beta2: float, eps: float) -> None:
    """NorMuon: divide each row by the root of its moving mean square; keep each matrix's norm."""
    second_MR1.lerp_(update_MRC.square().mean(-1, keepdim=True), 1 - beta2)
    before_M11 = torch.linalg.vector_norm(update_MRC, dim=(-2, -1), keepdim=True)
    update_MRC.div_(second_MR1.sqrt().add_(eps))
    after_M11 = torch.linalg.vector_norm(update_MRC, dim=(-2, -1), keepdim=True)
    update_MRC.mul_(before_M11.div_(after_M11.clamp_(min=eps)))
