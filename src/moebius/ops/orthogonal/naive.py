"""The truth about Newton-Schulz: X <- aX + (bA + cA^2) X with A = X X^T, in the dtype of X.

M matrices in a stack, R rows, C columns, Q the smaller of the two.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Polynomial = tuple[float, float, float]


class Iteration(NamedTuple):
    """What a matrix is divided by, at least `eps`, and the polynomials (a, b, c) that follow.

    `frobenius` divides by ||X||_F; `gram` by ||A||_F^(1/2) = (sum of s^4)^(1/4) times `margin`.
    """

    polynomials: tuple[Polynomial, ...]
    bound: Literal["frobenius", "gram"]
    eps: float
    margin: float = 1.0


def orthogonal_naive(x_MRC: Tensor, iteration: Iteration) -> Tensor:
    """See `moebius.ops.orthogonal.orthogonal_`."""
    gram_MQQ = _gram(x_MRC)
    if iteration.bound == "frobenius":
        norm_M11 = gram_MQQ.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].sqrt()
    else:
        norm_M11 = torch.linalg.vector_norm(gram_MQQ, dim=(-2, -1), keepdim=True)
        norm_M11.sqrt_().mul_(iteration.margin)
    norm_M11.clamp_(min=iteration.eps)
    x_MRC.div_(norm_M11)
    gram_MQQ.div_(norm_M11).div_(norm_M11)

    wide = x_MRC.shape[-2] <= x_MRC.shape[-1]
    other_MRC, map_MQQ = torch.empty_like(x_MRC), torch.empty_like(gram_MQQ)
    for i, (a, b, c) in enumerate(iteration.polynomials):
        if i:
            _gram(x_MRC, out=gram_MQQ)
        torch.baddbmm(gram_MQQ, gram_MQQ, gram_MQQ, beta=b, alpha=c, out=map_MQQ)
        left, right = (map_MQQ, x_MRC) if wide else (x_MRC, map_MQQ)
        torch.baddbmm(x_MRC, left, right, beta=a, out=other_MRC)
        x_MRC, other_MRC = other_MRC, x_MRC
    return x_MRC


def _gram(x_MRC: Tensor, out: Tensor | None = None) -> Tensor:
    """X X^T, or X^T X where that is smaller."""
    wide = x_MRC.shape[-2] <= x_MRC.shape[-1]
    left, right = (x_MRC, x_MRC.mT) if wide else (x_MRC.mT, x_MRC)
    return torch.bmm(left, right) if out is None else torch.bmm(left, right, out=out)
