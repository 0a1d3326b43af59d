"""An evaluation that says which weights it was given: `evaluation=.../seen.py:norms`."""

from typing import Any

from moebius.model.lm import LM


def norms(model: LM, *_: object, **__: Any) -> dict[str, float]:
    """The norm of each weight, by name."""
    return {name: float(weight.detach().norm()) for name, weight in model.named_parameters()}
