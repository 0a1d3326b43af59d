"""The dense twin of a MoE run: the same but for its feed-forwards, of equal active parameters."""

import dataclasses
from typing import Any

from moebius.config import fields
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.train.run import Run


def dense_twin(run: Run) -> Run:
    """Each MoE becomes one SwiGLU as wide as the mean of its selected experts, shared included."""
    return dataclasses.replace(run, name=f"{run.name}-dense", model=_dense(run.model))


def _dense(value: Any) -> Any:
    if isinstance(value, MoE):
        selected = value.layout.ffn_per_token + value.shared_experts
        return Dense(round(selected * value.expert_width))
    if isinstance(value, tuple):
        return tuple(_dense(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _dense(getattr(value, f.name)) for f in fields(type(value))}
        return type(value)(**changed)
    return value
