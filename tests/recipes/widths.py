"""The widths of every recipe side by side: what the dial made of the published numbers.

Each row is read off the recipe's config and counted by building: docs/architectures.md shows them.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from moebius.config import fields
from moebius.model.count import count_config
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.mixers import MixerConfig
from moebius.model.mixers.cla import CLA
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.kda import KDA
from moebius.model.mixers.mla import MLA
from moebius.model.mixers.nsa import NSA
from moebius.recipes import TABLE, recipe


def widths(names: Iterable[str] = TABLE) -> list[dict[str, str]]:
    """A row for each recipe: width, layers, attention, dense and expert widths, parameters."""
    return [_row(name) for name in names]


def _row(name: str) -> dict[str, str]:
    run = recipe(name)
    counts = count_config(run.model, run.vocab, run.sequence_length)
    return {
        "recipe": name,
        "D": f"{run.model.width:,}",
        "layers": str(len(run.model.layers)),
        "attention": _each(_parts(run.model.layers, MixerConfig)),
        "dense": _each(_parts(run.model.layers, Dense)),
        "experts": _each(_parts(run.model.layers, MoE)),
        "parameters": _size(counts.total),
        "active": _size(counts.active_mean),
    }


def _parts(value: Any, kind: type) -> list[Any]:
    """The configs of a kind in a tree of configs, each once, outermost only."""
    if isinstance(value, kind):
        return [value]
    found: list[Any] = []
    if isinstance(value, tuple):
        for item in dict.fromkeys(value):
            found += _parts(item, kind)
    elif dataclasses.is_dataclass(value):
        for field in fields(type(value)):
            found += _parts(getattr(value, field.name), kind)
    return list(dict.fromkeys(found))


def _each(parts: Iterable[Any]) -> str:
    return "; ".join(dict.fromkeys(_describe(part) for part in parts)) or "-"


def _describe(part: Any) -> str:
    if isinstance(part, CLA):
        return f"{_describe(part.of)}, shared"
    if isinstance(part, GQA | NSA):
        kind = "GQA" if isinstance(part, GQA) else "NSA"
        return f"{kind} {part.heads}/{part.kv_heads} x {part.head_width}"
    if isinstance(part, KDA):
        return f"KDA {part.heads} x {part.head_width}"
    if isinstance(part, MLA):
        latents = f"{part.q_rank or '-'}/{part.kv_rank}"
        return f"MLA {part.heads} x {part.nope_width}+{part.rope_width}, latents {latents}"
    if isinstance(part, Dense):
        return f"{part.hidden:,}"
    if isinstance(part, MoE):
        zero = f"+{part.zero_experts}" if part.zero_experts else ""
        shared = f" and {part.shared_experts} shared" if part.shared_experts else ""
        return f"{part.top_k} of {part.experts}{zero} x {part.expert_width:,}{shared}"
    return type(part).__name__


def _size(n: int) -> str:
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"
