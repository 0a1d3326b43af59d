"""Which dtype activations take: as the recipe says, or whichever a short measurement finds faster;
and in which format the weights of each role are multiplied.

Master weights stay fp32 (fp64 for `fp64`); only activations and the products read the choice.
"""

import time
from collections.abc import Callable

import torch

from moebius.config import from_json
from moebius.model.weight import PRODUCT_ROLES
from moebius.monitor.ceiling import synchronise
from moebius.ops.formats import Format, Product
from moebius.train.run import Precision, Run

# The dtype of activations, by the name of a precision.
DTYPES = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    **dict.fromkeys(Format.TABLE, torch.bfloat16),
}


def products_of(run: Run) -> dict[str, Product | None]:
    """The products of each role: what `precision` is short for, but what `products` names."""
    short: dict[str, Product | None] = {}
    if run.precision in Format.TABLE:
        short = dict.fromkeys(PRODUCT_ROLES, Product(from_json(Format, run.precision)))
    return short | dict(run.products)


def choose(
    precision: Precision, device: torch.device, work: Callable[[torch.dtype], None]
) -> tuple[str, dict[str, float]]:
    """The precision's name, and the seconds measured for each candidate (empty if none were).

    `auto` runs `work(dtype)`, a forward and backward of the model itself, in bf16 and fp32, three
    times each interleaved after one warm-up, and takes the faster.
    """
    if precision != "auto":
        return precision, {}
    seconds: dict[str, float] = {"bf16": float("inf"), "fp32": float("inf")}
    for attempt in range(4):
        for name in seconds:
            synchronise(device)
            start = time.perf_counter()
            work(DTYPES[name])
            synchronise(device)
            if attempt:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return min(seconds, key=lambda name: seconds[name]), seconds
