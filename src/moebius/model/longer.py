"""The model of a later stage of a run: the same weights under another rotary base.

A stage that has a `rope_base` gives it to every part of the config with a field of that name that
is not None (None means no positions). Whoever uses a checkpoint needs the base its weights were
last trained with, which the recipe and the checkpoint's token count say.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from moebius.config import fields, from_json
from moebius.model.lm import ModelConfig

T = TypeVar("T")


def with_rope_base(config: T, base: float) -> T:
    """A config tree with every `rope_base` in it replaced, but for those that are None."""
    return _map(config, base)


def _map(value: Any, base: float) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {}
        for field in fields(type(value)):
            old = getattr(value, field.name)
            if field.name != "rope_base":
                changes[field.name] = _map(old, base)
            elif old is not None:
                changes[field.name] = base
        return dataclasses.replace(value, **changes)
    if isinstance(value, tuple):
        return tuple(_map(item, base) for item in value)
    if isinstance(value, Mapping):
        return {key: _map(item, base) for key, item in value.items()}
    return value


def rope_bases(config: Any) -> Iterator[float]:
    """Every `rope_base` of a config tree that is not None."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        for field in fields(type(config)):
            value = getattr(config, field.name)
            if field.name != "rope_base":
                yield from rope_bases(value)
            elif value is not None:
                yield value
    elif isinstance(config, tuple | Mapping):
        for item in config.values() if isinstance(config, Mapping) else config:
            yield from rope_bases(item)


def effective_model(recipe: Mapping[str, Any], tokens: int) -> ModelConfig:
    """The model to use with a checkpoint of so many trained tokens. `recipe` is a run's JSON.

    At a stage's very beginning no token of it is trained: there the base before it still holds.
    """
    model = from_json(ModelConfig, recipe["model"])
    for stage in _begun(recipe, tokens):
        if stage.get("rope_base") is not None:
            model = with_rope_base(model, float(stage["rope_base"]))
    return model


def effective_length(recipe: Mapping[str, Any], tokens: int) -> int:
    """The length of the sequences that the last of so many tokens were trained in."""
    lengths = [recipe["sequence_length"], *(s["sequence_length"] for s in _begun(recipe, tokens))]
    return lengths[-1]


def _begun(recipe: Mapping[str, Any], tokens: int) -> list[Mapping[str, Any]]:
    return [stage for stage in recipe.get("stages", ()) if stage["at_tokens"] < tokens]
