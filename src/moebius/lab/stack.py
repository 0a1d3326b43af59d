"""Growth by stacking (LongCat-Flash 3.1.2): layers l1..ln become l1..ln, l1..ln, r times over.

Everything of a layer is repeated with it: weights, router biases, optimizer moments. Embedding,
final norm, head and ends are taken over as they are. What layers lend each other (cross-layer keys
and values) stays within a copy, because a group of them is copied whole; that is checked.
"""

import dataclasses
import re

from moebius.model.lm import LM, ModelConfig

# No model is deeper; a slip of the finger would build for hours.
MOST = 10_000
_LAYER = re.compile(r"(?<=^(?:model|optim)\.layers\.)(\d+)(?=\.)")


def stacked(config: ModelConfig, times: int) -> ModelConfig:
    """The config with its layers `times` over; ValueError below 2."""
    if times < 2:
        raise ValueError(f"layers times {times} is no growth; take 2x or more")
    if times * len(config.layers) > MOST:
        raise ValueError(
            f"{len(config.layers)} layers times {times} are more than {MOST}; take a smaller factor"
        )
    return dataclasses.replace(config, layers=times * config.layers)


def stacked_from(name: str, num_layers: int) -> str:
    """Which tensor of a parent of `num_layers` layers the tensor `name` of the stack repeats."""
    return _LAYER.sub(lambda match: str(int(match[1]) % num_layers), name)


def check_lenders(model: LM, num_layers: int) -> None:
    """ValueError where a layer of the stack borrows from beyond its own copy of `num_layers`."""
    for unit in model.units():
        if unit.start // num_layers != (unit.stop - 1) // num_layers:
            raise ValueError(
                f"these layers cannot be stacked: layers.{unit.stop - 1} would borrow from "
                f"layers.{unit.start}, of another copy; let lender and borrowers repeat as a group"
            )
