"""Checkpoints that are complete or do not exist: written aside, verified by hash, then renamed.

`save` writes one, `Background` one while the run goes on; `load` reads one after verifying it,
`latest_intact` finds the one to go on from. A checkpoint is a folder `step-00000120` of
safetensors, `state.json` and `manifest.json`.
"""

from moebius.checkpoint.background import Background
from moebius.checkpoint.load import complete, latest_intact, load, verify
from moebius.checkpoint.manifest import CheckpointError
from moebius.checkpoint.save import JSON, save

__all__ = [
    "JSON",
    "Background",
    "CheckpointError",
    "complete",
    "latest_intact",
    "load",
    "save",
    "verify",
]
