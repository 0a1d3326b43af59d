"""Activation checkpointing, unit by unit, that reuses the saved routing.

The top-k of a router is saved, never recomputed: a near-tie cannot flip between forward and
backward (torchtitan #1117 and many others). Taps are silent while recomputing, and the stats of
the second pass are discarded with it, so loads count once.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from moebius.monitor.tap import silence
from moebius.ops.topk import OPERATORS

Function = TypeVar("Function", bound=Callable[..., Any])


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = op in OPERATORS
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(function: Function) -> Function:
    """The same function, whose activations are not kept but computed again in the backward."""
    return partial(
        checkpoint,
        function,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=_contexts,
    )  # pyright: ignore


def _contexts() -> tuple[Any, Any]:
    """The contexts of the first and the second pass."""
    first, second = create_selective_checkpoint_contexts(_policy)
    return first, _both(second)


@contextlib.contextmanager
def _both(context: Any) -> Iterator[None]:
    with context, silence():
        yield
