"""Saving while the run goes on: what is to be saved is copied, and a thread writes it.

The thread does what `save` does, so a checkpoint is complete or does not exist. There is one at a
time; what went wrong with it is said at the next chance.
"""

from collections.abc import Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, final

import torch

from moebius.checkpoint.save import JSON, save
from moebius.checkpoint.tensors import plan_files


@final
class Background:
    """What writes a checkpoint, one after the other."""

    def __init__(self) -> None:
        self._writing: futures.Future[Any] | None = None

    def save(
        self,
        folder: Path,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        state: Mapping[str, JSON],
        *,
        keep: int,
    ) -> None:
        """`checkpoint.save` of what the tensors are now, which takes their size of memory.

        Waits for the checkpoint before this one, and raises what `wait` does.
        """
        self.wait()
        plan_files(tensors)  # what cannot be saved is refused at once
        copies = {name: x.detach().to("cpu", copy=True) for name, x in tensors.items()}
        pool = futures.ThreadPoolExecutor(1, thread_name_prefix=f"checkpoint of step {step}")
        self._writing = pool.submit(save, folder, step, copies, state, keep=keep)
        pool.shutdown(wait=False)

    def follow(self, writing: futures.Future[Any]) -> None:
        """Take over a checkpoint that is being written elsewhere, once there is no other."""
        self.wait()
        self._writing = writing

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._writing is not None and not self._writing.done()

    @property
    def failed(self) -> bool:
        """Whether `wait` will raise; False while that is not known."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def wait(self) -> None:
        """Until the checkpoint is there; CheckpointError (as `save`) where it could not be."""
        if self._writing is not None:
            futures.wait([self._writing])  # interrupted, it is still to be waited for
            writing, self._writing = self._writing, None
            writing.result()
