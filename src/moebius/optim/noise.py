"""Gradient noise and what it says of learning rates: pure functions of numbers.

The noise scale B_noise = tr(Sigma) / |G|^2 from two batch sizes (McCandlish et al. 2018, arXiv
1812.06162, A.1), the best Adam rate of a batch (SURGE, Li et al. 2024, arXiv 2405.14578), and from
it Hunyuan-Large's rate of routed experts (arXiv 2411.02265, eq. 1). Batches are counted in any unit
(tokens, sequences), so long as it is the same one everywhere.
"""

import math


def noise_scale(
    small_norm_sq: float, big_norm_sq: float, small: int, big: int
) -> tuple[float, float]:
    """(|G|^2, tr(Sigma)) of the true gradient G and the covariance of one example's.

    E|G_B|^2 = |G|^2 + tr(Sigma) / B for the mean gradient of B examples; two batch sizes solve for
    both, without bias. Their ratio is biased and noisy: average each of the two over many
    measurements first, then divide. Either may come out negative where the noise hides it.
    """
    if not 0 < small < big:
        raise ValueError(
            f"small={small} and big={big} must be two batch sizes with 0 < small < big"
        )
    signal = (big * big_norm_sq - small * small_norm_sq) / (big - small)
    noise = (small_norm_sq - big_norm_sq) / (1 / small - 1 / big)
    return signal, noise


def optimal_lr(batch: float, noise: float, peak_lr: float) -> float:
    """SURGE's eps_opt(B) = 2 eps_max / (sqrt(B_noise / B) + sqrt(B / B_noise)), for Adam.

    It rises as sqrt(B), is `peak_lr` at B = B_noise, and falls beyond it.
    """
    _check_positive("batch", batch)
    _check_positive("noise", noise)
    return 2 * peak_lr / (math.sqrt(noise / batch) + math.sqrt(batch / noise))


def expert_lr_multiplier(
    batch_tokens: float, noise_tokens: float, experts: int, top_k: int
) -> float:
    """What multiplies the rate of routed experts, each of which sees k/E of the batch's tokens.

    m(x) = eps_opt(B k/E) / eps_opt(B) = sqrt(E/k) (1 + x) / (E/k + x) with x = B / B_noise: it goes
    to sqrt(k/E) for small batches and is 1 at x = sqrt(E/k). Hunyuan-Large's 0.31 for 1 of 16 is
    m(0.26); the paper prints the inverse ratio, which is 0.31 only where experts should go faster.
    SURGE derives it for the sign-like updates of Adam; it does not carry over to Muon's.
    """
    if not 0 < top_k <= experts:
        raise ValueError(f"top_k={top_k} must lie between 1 and experts={experts}")
    _check_positive("batch_tokens", batch_tokens)
    _check_positive("noise_tokens", noise_tokens)
    x, share = batch_tokens / noise_tokens, experts / top_k
    return math.sqrt(share) * (1 + x) / (share + x)


def _check_positive(name: str, size: float) -> None:
    if not size > 0:
        raise ValueError(f"{name}={size} must be above 0")
