"""Saving while the run goes on: what is to be saved is copied, and a thread writes it.

The thread does what `save` does, so a checkpoint is complete or does not exist. There is one at a
time; what went wrong with it is said at the next chance.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import final

import torch

from moebius.checkpoint.save import JSON, save
from moebius.checkpoint.tensors import Lazy, copied, plan_files


@final
class Background:
    """A thread that writes checkpoints, one after the other."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(
        self,
        folder: Path,
        step: int,
        tensors: Mapping[str, torch.Tensor | Lazy],
        state: Mapping[str, JSON],
        *,
        keep: int,
    ) -> None:
        """`checkpoint.save` of what the tensors are now, which takes their size of memory.

        Lazy tensors are made here and now, in the order of `follow`. Waits for the checkpoint
        before this one, and raises what `wait` does.
        """
        self.wait()
        names = [name for file in plan_files(tensors) for name in file.tensors]
        copies = {name: copied(tensors[name]) for name in names}

        def write() -> None:
            try:
                save(folder, step, copies, state, keep=keep)
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=write, name=f"checkpoint of step {step}")
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise what went wrong with a checkpoint that is through; never waits."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint is there; CheckpointError (as `save`) where it could not be."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error
