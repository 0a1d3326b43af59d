"""Muon (Jordan et al. 2024): momentum, made orthogonal by Newton-Schulz, as the update of a matrix.

Options from later work: Polar Express coefficients (arXiv 2505.16932), update RMS matched to
AdamW's (Moonlight, arXiv 2502.16982), NorMuon's second moment per row (arXiv 2510.05491), cautious
weight decay (arXiv 2510.12402). Matrices of equal shape, experts included, go through Newton-Schulz
together. M matrices in a stack, R rows, C columns, R <= C once transposed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moebius.optim.rules import Rule, Slot, State, state_dtype

QUINTIC = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# Once all singular values are near 1: the quintic with the flattest fixed point there.
CLOSING = (1.875, -1.25, 0.375)
# Polar Express diverges just above a spectral norm of 1, which rounding to bf16 can reach.
POLAR_MARGIN = 1.02
# Elements that go through Newton-Schulz at once; bounds the scratch memory.
PIECE = 1 << 21


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

    Polar Express is a list of 5 polynomials; `steps` above 5 add closing ones. `scale` multiplies
    the orthogonal update: match_rms by 0.2*sqrt(max(rows, cols)), original by
    sqrt(max(1, rows/cols)), spectral by sqrt(rows/cols). `compute` is the dtype of Newton-Schulz
    alone: bf16 is 2.3 times as fast as fp32 on a CPU with AMX, and the update is only nearly
    orthogonal in either. Momentum, norms and the applied update are in fp32; fp64 weights have
    everything in fp64.
    """

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
        if not (0 <= self.momentum < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"momentum={self.momentum}, beta2={self.beta2} must lie in [0, 1)")
        if self.eps <= 0:
            raise ValueError(f"eps={self.eps} must be above 0")
        fewest = len(POLAR_EXPRESS) if self.coefficients == "polar_express" else 1
        if self.steps < fewest:
            raise ValueError(f"steps={self.steps}: {self.coefficients} needs at least {fewest}")

    def init(self, slots: Sequence[Slot], params: Sequence[Tensor]) -> list[State]:
        states: list[State] = []
        for slot, param in zip(slots, params, strict=True):
            _check(slot, param)
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
    ) -> None:
        rows = zip(slots, params, grads, states, strict=True)
        for piece in _pieces([_matrices(*row) for row in rows]):
            for part, update_MRC in zip(piece, self._directions(piece), strict=True):
                self._apply(part, update_MRC, lr, weight_decay)

    def _directions(self, piece: Sequence[Matrices]) -> list[Tensor]:
        """The orthogonal update of each part of a piece, in the dtype of its momentum."""
        updates = [self._momentum(part) for part in piece]
        rows, cols = updates[0].shape[-2:]
        dtype = self._compute_dtype(updates[0])
        shape = (sum(len(update) for update in updates), min(rows, cols), max(rows, cols))
        stack_MRC = torch.empty(shape, dtype=dtype, device=updates[0].device)
        slices = stack_MRC.split([len(update) for update in updates])
        margin = POLAR_MARGIN if self.coefficients == "polar_express" else 1.0
        for update, place in zip(updates, slices, strict=True):
            norm_M11 = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
            update.div_(norm_M11.mul_(margin).clamp_(min=self.eps))
            place.copy_(update.mT if rows > cols else update)
        orthogonal = orthogonalise(stack_MRC, self._polynomials())
        slices = orthogonal.split([len(update) for update in updates])
        for update, place in zip(updates, slices, strict=True):
            update.copy_(place.mT if rows > cols else place)
        return updates

    def _momentum(self, part: Matrices) -> Tensor:
        """Move the momentum; a new tensor with the direction it gives."""
        grad = part.grad_MRC.to(part.momentum_MRC.dtype)
        part.momentum_MRC.lerp_(grad, 1 - self.momentum)
        return grad.lerp(part.momentum_MRC, self.momentum if self.nesterov else 1.0)

    def _compute_dtype(self, update: Tensor) -> torch.dtype:
        if self.compute == "bf16" and update.dtype != torch.float64:
            return torch.bfloat16
        return update.dtype

    def _polynomials(self) -> Sequence[tuple[float, float, float]]:
        if self.coefficients == "quintic":
            return [QUINTIC] * self.steps
        return [*POLAR_EXPRESS, *[CLOSING] * (self.steps - len(POLAR_EXPRESS))]

    def _apply(self, part: Matrices, update_MRC: Tensor, lr: float, weight_decay: float) -> None:
        """Move the weights of a part along `update_MRC`, which is overwritten."""
        if part.second_MR1 is not None:
            _equalise_rows(update_MRC, part.second_MR1, self.beta2, self.eps)
        weight_MRC = part.weight_MRC
        if self.cautious:
            decayed_MRC = (update_MRC * weight_MRC >= 0).to(weight_MRC.dtype)
            weight_MRC.mul_(decayed_MRC.mul_(-lr * weight_decay).add_(1))
        else:
            weight_MRC.mul_(1 - lr * weight_decay)
        weight_MRC.add_(update_MRC, alpha=-lr * self._scale(*weight_MRC.shape[-2:]))

    def _scale(self, rows: int, cols: int) -> float:
        if self.scale == "match_rms":
            return 0.2 * math.sqrt(max(rows, cols))
        return math.sqrt(max(1.0, rows / cols) if self.scale == "original" else rows / cols)


def orthogonalise(x_MRC: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """Newton-Schulz: X <- aX + (bA + cA^2) X with A = X X^T, once a polynomial; overwrites x_MRC.

    The singular values of each matrix must be at most 1, and R <= C keeps A small.
    """
    gram_MRR = x_MRC.new_empty(*x_MRC.shape[:-1], x_MRC.shape[-2])
    poly_MRR, next_MRC = torch.empty_like(gram_MRR), torch.empty_like(x_MRC)
    for a, b, c in polynomials:
        torch.bmm(x_MRC, x_MRC.mT, out=gram_MRR)
        torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=b, alpha=c, out=poly_MRR)
        torch.baddbmm(x_MRC, poly_MRR, x_MRC, beta=a, out=next_MRC)
        x_MRC, next_MRC = next_MRC, x_MRC
    return x_MRC


def _check(slot: Slot, param: Tensor) -> None:
    if param.ndim not in (2, 3):
        shape = list(param.shape)
        raise ValueError(f"muon needs a matrix or a stack of them; {slot.name} is {shape}")
    if slot.blocks < 1 or param.shape[-2] % slot.blocks:
        rows = param.shape[-2]
        raise ValueError(f"{slot.name}: {rows} rows do not divide into {slot.blocks} blocks")


def _matrices(slot: Slot, param: Tensor, grad: Tensor, state: State) -> Matrices:
    shape = (-1, param.shape[-2] // slot.blocks, param.shape[-1])
    second = state.get("row_moment")
    return Matrices(
        param.view(shape),
        grad.reshape(shape),
        state["momentum"].view(shape),
        None if second is None else second.view(-1, shape[1], 1),
    )


def _pieces(weights: Sequence[Matrices]) -> Iterator[list[Matrices]]:
    """All matrices, in pieces of one shape, dtype and device and of at most PIECE elements."""
    groups: dict[tuple[object, ...], list[Matrices]] = {}
    for weight in weights:
        tensor = weight.weight_MRC
        key = (*tensor.shape[-2:], tensor.dtype, tensor.device)
        groups.setdefault(key, []).append(weight)
    for group in groups.values():
        _, rows, cols = group[0].weight_MRC.shape
        most = max(1, PIECE // (rows * cols))
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
