"""The polynomials of Newton-Schulz, and what a matrix is divided by before them.

X <- aX + (bA + cA^2) X with A = X X^T (Muon, Jordan et al. 2024), coefficients of Polar Express
(Amsel et al. 2025, arXiv 2505.16932). The products are `moebius.ops.orthogonal`.
"""

from moebius.ops.orthogonal import Iteration, Polynomial

QUINTIC: Polynomial = (3.4445, -4.7750, 2.0315)
# The published list, for singular values from 1e-3 to 1: they end in [0.85, 1.15].
POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# The same in four steps, for singular values from 3.5e-3 on: these end in [0.79, 1.21].
POLAR_EXPRESS_FOUR: tuple[Polynomial, ...] = (
    (8.057942260633721, -22.052186489864543, 15.540709424066272),
    (3.92634907759703, -2.7537926349107726, 0.49735356790446217),
    (3.4544719962674857, -2.4875458242488317, 0.4775129072646362),
    (2.51152716635273, -1.8524483560830065, 0.43883263558021074),
)
# Once all singular values are near 1: the quintic with the flattest fixed point there.
CLOSING: Polynomial = (1.875, -1.25, 0.375)
# Polar Express diverges just above a spectral norm of 1, which rounding to bf16 can reach.
POLAR_MARGIN = 1.02


def polar_express(steps: int) -> list[Polynomial]:
    """Polar Express in at least four steps; those beyond five close in on 1."""
    if steps == len(POLAR_EXPRESS_FOUR):
        return list(POLAR_EXPRESS_FOUR)
    return [*POLAR_EXPRESS, *[CLOSING] * (steps - len(POLAR_EXPRESS))]


def quintic_iteration(steps: int, eps: float) -> Iteration:
    """Muon's first iteration: singular values of x / ||x||_F end in [0.68, 1.13]."""
    return Iteration((QUINTIC,) * steps, "frobenius", eps)


def polar_iteration(steps: int, eps: float) -> Iteration:
    """The polar factor of matrices of any size.

    Matrices are divided by ||A||_F^(1/2) = (sum of s^4)^(1/4), which bounds the largest singular
    value as ||x||_F does, but 1.3 to 2.2 times as tightly on the momenta of trained models, at no
    cost, because A is needed anyway: so much smaller singular values still arrive at 1.
    """
    return Iteration(tuple(polar_express(steps)), "gram", eps, POLAR_MARGIN)
