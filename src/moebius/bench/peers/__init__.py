"""Other code beside ours: one file a peer, which builds its own model of a run's shapes and steps
it.

A peer is a module with `prepare(run, batch, device, folder) -> Peer`, called in the parent, which
compares outputs and gradients of the two models; its stepper runs in a process of its own.
torchtitan (0.3) has no file: it takes CUDA where there is no accelerator.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from moebius.config import nearest, resolve
from moebius.data.loader import Batch
from moebius.train.run import Run

PEERS: Mapping[str, str] = {
    "transformers": "moebius.bench.peers.transformers:prepare",
    "litgpt": "moebius.bench.peers.litgpt:prepare",
}


@dataclasses.dataclass(frozen=True)
class Peer:
    """A peer that is ready to be timed: its stepper, that stepper's options, and how it agrees."""

    name: str
    stepper: str
    options: dict[str, Any]
    # Relative errors of its model against ours, from the same weights on the same tokens.
    errors: dict[str, float]
    agrees: bool
    notes: tuple[str, ...]


Prepare = Callable[[Run, Batch, torch.device, Path], Peer]


def peer_named(name: str) -> Prepare:
    """The `prepare` of a peer."""
    if name not in PEERS:
        raise ValueError(f"unknown peer {name!r}{nearest(name, PEERS)}")
    return resolve(PEERS[name])
