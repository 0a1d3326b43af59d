"""Sparse upcycling (Komatsuzaki et al. 2212.05055): every dense feed-forward becomes a MoE of its
copies.

The weights of a token's experts sum to 1, so the first output is the parent's. A new expert starts
with the moments of the feed-forward it copies; a router is drawn from the run's seed and has none.
Letters: E experts.
"""

import dataclasses
import re
from collections.abc import Container

from moebius.model.block import BlockConfig
from moebius.model.ffn.balance.group import GroupLoss
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import ModelConfig

# Copies that nobody means to make; the model of them would not fit anywhere.
MOST = 10_000
# `w_gate_up_E2FD` holds E copies of `w_gate_up`.
_OF_EXPERTS = re.compile(r"_E[0-9A-Z]*(?=\.|$)")


def upcycled(config: ModelConfig, experts: int, top_k: int) -> ModelConfig:
    """The config with a MoE for every dense feed-forward; ValueError where none is or fits."""
    if experts < 2:
        raise ValueError(f"experts ({experts}) must be at least 2")
    if experts > MOST:
        raise ValueError(f"experts ({experts}) must be at most {MOST}")
    if not 2 <= top_k <= experts:
        raise ValueError(
            f"top_k ({top_k}) must lie in 2..{experts}, the experts; a single renormalised expert "
            "has the weight 1, and its router no gradient"
        )
    pairs = enumerate(config.layers)
    layers = tuple(_upcycled(f"layers.{i}", layer, experts, top_k) for i, layer in pairs)
    if layers == config.layers:
        raise ValueError("no layer of this run has a dense feed-forward that could become a MoE")
    return dataclasses.replace(config, layers=layers)


def _upcycled(where: str, layer: BlockConfig, experts: int, top_k: int) -> BlockConfig:
    parts = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    dense = {name: part for name, part in parts.items() if isinstance(part, Dense)}
    if dense and any(isinstance(part, MoE) for part in parts.values()):
        raise ValueError(
            f"{where} ({type(layer).__name__}) has dense feed-forwards beside a MoE and is sparse "
            "already; upcycling is for layers that are dense"
        )
    grown = {name: _moe(part, experts, top_k) for name, part in dense.items()}
    return dataclasses.replace(layer, **grown)


def _moe(dense: Dense, experts: int, top_k: int) -> MoE:
    return MoE(
        experts=experts,
        top_k=top_k,
        expert_width=dense.hidden,
        router=Softmax(renormalise=True),
        balance=(GroupLoss(),),
        bias=dense.bias,
    )


def upcycled_from(name: str, parent: Container[str]) -> str | None:
    """Which tensor of the parent the tensor `name` is or repeats; None for what begins anew."""
    source = name if name in parent else _OF_EXPERTS.sub("", name)
    return source if source in parent else None
