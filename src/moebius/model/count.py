"""Counting by building: parameters, active parameters and FLOPs of a model, from its modules.

Active = every matrix weight a token's products read, router and head included, the embedding
look-up not, a tied matrix once. Norms and other vectors count too; they are small.
"""

import dataclasses

import torch

from moebius.model.ffn import FeedForward
from moebius.model.lm import LM, ModelConfig
from moebius.model.mixers import Mixer
from moebius.model.weight import named_weights


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameters in all, and touched by one token (fewest, mean, most); FLOPs per token."""

    total: int
    active_min: int
    active_mean: int
    active_max: int
    # Forward matmul FLOPs per token with weights (mean), and beyond weights at `context`.
    flops_weights: float
    flops_mixing: float

    @property
    def flops_train(self) -> float:
        """Forward and backward FLOPs per token: the backward of a product is two products."""
        return 3.0 * (self.flops_weights + self.flops_mixing)


def count(model: LM, context: int) -> Counts:
    """Count a model (on any device, meta included) at a context length in tokens."""
    shares: dict[int, tuple[float, float, float]] = {}
    mixing = 0.0
    for module in model.modules():
        if isinstance(module, FeedForward):
            for name, share in module.uses_per_token().items():
                shares[id(module.get_parameter(name))] = share
        if isinstance(module, Mixer):
            mixing += module.flops(context)
    total, active, matmul = 0, [0.0, 0.0, 0.0], 0.0
    for _, weight in named_weights(model):
        total += weight.numel()
        if weight.role == "embedding":
            continue
        share = shares.get(id(weight), (1.0, 1.0, 1.0))
        for i in range(3):
            active[i] += share[i] * weight.numel()
        matmul += 2.0 * share[1] * weight.numel() if weight.is_matrix else 0.0
    least, mean, most = (round(number) for number in active)
    return Counts(total, least, mean, most, matmul, mixing)


def count_config(config: ModelConfig, vocab: int, context: int) -> Counts:
    """Count a model without building it in memory."""
    with torch.device("meta"):
        return count(config.build(vocab), context)
