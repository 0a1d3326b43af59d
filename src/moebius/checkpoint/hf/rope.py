"""Rotary positions in a config.json: `rope_parameters`, or the older `rope_theta` and
`rope_scaling`.
"""

from collections.abc import Callable
from typing import Any

from moebius.checkpoint.hf.keys import Keys
from moebius.checkpoint.hf.refusals import Unfit
from moebius.config import nearest
from moebius.model.rope import Linear, Llama3, NTKAlpha, RopeScaling, YaRN


def read_rope(keys: Keys, default_base: float = 10_000.0) -> tuple[float, RopeScaling | None]:
    """The base and the scaling of a config; takes `max_position_embeddings` as well."""
    longest = keys.integer_or_none("max_position_embeddings")
    base = keys.number("rope_theta", default_base)
    old, new = keys.below("rope_scaling"), keys.below("rope_parameters")
    scaling = None
    # As in transformers: what is inside wins over what is outside, the older object over the newer.
    for found in (new, old):
        if found is not None:
            base = found.number("rope_theta", base)
            scaling = _read_scaling(found, longest)
            found.finish()
    return base, scaling


def read_plain_rope(keys: Keys, default_base: float = 10_000.0) -> tuple[float, RopeScaling | None]:
    """Base and scaling where "dynamic" does not mean what it does to Hunyuan."""
    base, scaling = read_rope(keys, default_base)
    if isinstance(scaling, NTKAlpha):
        raise ValueError("config.json: rope type 'dynamic' with alpha is Hunyuan's; not known here")
    return base, scaling


def _read_scaling(found: Keys, longest: int | None) -> RopeScaling | None:
    old = found.text("type", "default")
    kind = found.text("rope_type", old)
    found.must("partial_rotary_factor", 1.0, None, why="only whole heads are rotated")
    if kind not in _READERS:
        raise ValueError(f"config.json: unknown rope type {kind!r}{nearest(kind, _READERS)}")
    return _READERS[kind](found, longest)


def _default(found: Keys, longest: int | None) -> None:
    return None


def _linear(found: Keys, longest: int | None) -> RopeScaling:
    return Linear(found.number("factor"))


def _dynamic(found: Keys, longest: int | None) -> RopeScaling:
    if not found.has("alpha"):
        raise ValueError(
            "config.json: rope type 'dynamic' without alpha changes with the length of each "
            "sequence; set rope_type to 'default', which it equals up to max_position_embeddings"
        )
    # Hunyuan's configs carry YaRN's keys beside alpha; its code does not read them.
    for name in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        found.number_or_none(name)
    return NTKAlpha(found.number("alpha"))


def _yarn(found: Keys, longest: int | None) -> RopeScaling:
    length = found.integer_or_none("original_max_position_embeddings") or longest
    if length is None:
        raise ValueError("config.json: yarn needs original_max_position_embeddings")
    factor = found.number_or_none("factor")
    if factor is None:
        factor = (longest or length) / length
    return YaRN(
        factor=factor,
        original_length=length,
        beta_fast=found.number_or_none("beta_fast") or 32.0,
        beta_slow=found.number_or_none("beta_slow") or 1.0,
        truncate=found.flag("truncate", True),
        attention_factor=found.number_or_none("attention_factor"),
        mscale=found.number_or_none("mscale"),
        mscale_all_dim=found.number_or_none("mscale_all_dim"),
    )


def _llama3(found: Keys, longest: int | None) -> RopeScaling:
    length = found.integer_or_none("original_max_position_embeddings") or longest
    if length is None:
        raise ValueError("config.json: llama3 needs original_max_position_embeddings")
    return Llama3(
        factor=found.number("factor"),
        low_factor=found.number("low_freq_factor"),
        high_factor=found.number("high_freq_factor"),
        original_length=length,
    )


_READERS: dict[str, Callable[[Keys, int | None], RopeScaling | None]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}


def write_rope(base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Both spellings, which every loader reads one of; equal, so that their order is nothing."""
    named = {"rope_type": "default"} if scaling is None else _write_scaling(scaling)
    return {
        "rope_theta": base,
        "rope_scaling": None if scaling is None else {**named, "rope_theta": base},
        "rope_parameters": {**named, "rope_theta": base},
    }


def _write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    match scaling:
        case Linear():
            return {"rope_type": "linear", "factor": scaling.factor}
        case NTKAlpha():
            return {"rope_type": "dynamic", "alpha": scaling.alpha, "factor": 1.0}
        case Llama3():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_factor,
                "high_freq_factor": scaling.high_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
        case YaRN():
            optional = {
                "attention_factor": scaling.attention_factor,
                "mscale": scaling.mscale,
                "mscale_all_dim": scaling.mscale_all_dim,
            }
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
                **{name: value for name, value in optional.items() if value is not None},
            }
        case _:
            raise Unfit(f"no config.json can hold the rope scaling {type(scaling).__name__}")
