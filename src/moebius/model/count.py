"""Counting by building: parameters, active parameters and FLOPs of a model, from its modules.

Active = every matrix weight a token's products read, router and head included, the embedding
look-up not, a tied matrix once. Norms and other vectors count too; they are small. Every weight
belongs to one of `GROUPS`, and so does what its products cost.
"""

import dataclasses
from collections import defaultdict

import torch
from torch import nn

from moebius.model.ends import End
from moebius.model.ffn import FeedForward
from moebius.model.ffn.routers import Router
from moebius.model.lm import LM, ModelConfig
from moebius.model.mixers import Mixer
from moebius.model.weight import Weight, named_weights

GROUPS = (
    "embedding",
    "mixers",
    "dense",
    "experts",
    "shared_experts",
    "router",
    "norms",
    "ends",
    "other",
    "head",
)
_OF_ROLE = {"embedding": "embedding", "head": "head", "expert": "experts", "router": "router"}


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
    def flops_forward(self) -> float:
        """Forward FLOPs per token."""
        return self.flops_weights + self.flops_mixing

    @property
    def flops_backward(self) -> float:
        """Backward FLOPs per token: the backward of a product is two products."""
        return 2.0 * self.flops_forward

    @property
    def flops_train(self) -> float:
        """Forward and backward FLOPs per token."""
        return self.flops_forward + self.flops_backward


@dataclasses.dataclass(frozen=True)
class Use:
    """A weight with its group, and the share of it that a token touches (min, mean, max)."""

    name: str
    weight: Weight
    group: str
    share: tuple[float, float, float]


def count(model: LM, context: int) -> Counts:
    """Count a model (on any device, meta included) at a context length in tokens."""
    return _counts(uses(model), sum(_mixing(model, context).values()))


def count_groups(model: LM, context: int) -> dict[str, Counts]:
    """The same by group of weights, in the order of `GROUPS`, empty ones left out."""
    weights, mixing = uses(model), _mixing(model, context)
    present = {use.group for use in weights} | mixing.keys()
    return {
        group: _counts([use for use in weights if use.group == group], mixing[group])
        for group in GROUPS
        if group in present
    }


def flops_of_layers(model: LM, context: int) -> list[float]:
    """Forward FLOPs per token of each layer, its mixers' beyond weights included."""
    blocks, of = model.blocks(), uses(model)
    return [
        _counts(
            [use for use in of if use.name.startswith(f"layers.{i}.")],
            sum(part.flops(context) for part in block.modules() if isinstance(part, Mixer)),
        ).flops_forward
        for i, block in enumerate(blocks)
    ]


def count_config(config: ModelConfig, vocab: int, context: int) -> Counts:
    """Count a model without building it in memory."""
    with torch.device("meta"):
        return count(config.build(vocab), context)


def uses(model: LM) -> list[Use]:
    """Every weight once, in the order of declaration."""
    shares: dict[int, tuple[float, float, float]] = {}
    groups: dict[int, str] = {}
    # Parents come before their children, so that the innermost part names a weight's group; but
    # all of an end is the end's.
    for module in model.modules():
        name = _group_of(module)
        if isinstance(module, FeedForward):
            for own, share in module.uses_per_token().items():
                shares[id(module.get_parameter(own))] = share
        for weight in module.parameters() if name else ():
            if groups.get(id(weight)) != "ends":
                groups[id(weight)] = name
    found: list[Use] = []
    for name, weight in named_weights(model):
        group, share = groups.get(id(weight), "other"), shares.get(id(weight))
        if group != "ends":
            group = _by_role(weight, group, share is not None)
        if weight.role == "embedding":
            share = (0.0, 0.0, 0.0)
        found.append(Use(name, weight, group, share or (1.0, 1.0, 1.0)))
    return found


def _group_of(module: nn.Module) -> str:
    """What a part's weights belong to unless their roles say more; nothing for a mere container."""
    if isinstance(module, End):
        return "ends"
    if isinstance(module, Mixer):
        return "mixers"
    if isinstance(module, Router):
        return "router"
    if isinstance(module, FeedForward):
        routed = any(isinstance(part, Router) for part in module.modules())
        return "shared_experts" if routed else "dense"
    return ""


def _by_role(weight: Weight, group: str, chosen: bool) -> str:
    if weight.role == "norm":
        return "norms"
    return "experts" if chosen else _OF_ROLE.get(weight.role, group)


def _mixing(model: LM, context: int) -> defaultdict[str, float]:
    """FLOPs beyond weights, by group."""
    found: defaultdict[str, float] = defaultdict(float)
    of_ends = {id(part) for end in model.ends for part in end.modules()}
    for module in model.modules():
        if isinstance(module, Mixer):
            found["ends" if id(module) in of_ends else "mixers"] += module.flops(context)
    return found


def _counts(weights: list[Use], mixing: float) -> Counts:
    total, active, matmul = 0, [0.0, 0.0, 0.0], 0.0
    for use in weights:
        size = use.weight.numel()
        total += size
        for i in range(3):
            active[i] += use.share[i] * size
        matmul += 2.0 * use.share[1] * size if use.weight.is_matrix else 0.0
    least, mean, most = (round(number) for number in active)
    return Counts(total, least, mean, most, matmul, mixing)
