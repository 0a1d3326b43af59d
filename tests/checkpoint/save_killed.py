"""Saves that are killed: run by test_killed.py in a process of its own, which forks.

Of the line events of one save, `sys.settrace` counts to a chosen one and sends SIGKILL there.
"""

import os
import random
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import moebius.checkpoint.tensors as tensors_module
from moebius.checkpoint import save

PLACES = (str(Path("moebius") / "checkpoint"), "shutil.py")


def content(step: int, version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + version)
    return {f"layer.{i}": torch.randn(300, generator=generator) for i in range(4)}


def trace_saving(folder: Path, step: int, kill_at: int | None) -> int:
    """Save, counting lines; at line `kill_at` the process dies."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if not any(place in frame.f_code.co_filename for place in PLACES):
            return None
        if event == "line":
            lines += 1
            if lines == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    save(folder, step, content(step, version=1), {"step": step, "version": 1}, keep=1)
    sys.settrace(None)
    return lines


def main(root: Path, step: int, rounds: int) -> None:
    """Save step 10, then `step` in copies of that folder, each killed at another line."""
    tensors_module.CHUNK_BYTES = 256
    base = root / "base"
    save(base, 10, content(10, version=0), {"step": 10, "version": 0}, keep=1)
    shutil.copytree(base, root / "dry")
    lines = trace_saving(root / "dry", step, kill_at=None)
    shutil.rmtree(root / "dry")
    for line in random.Random(step).sample(range(1, lines + 1), rounds):
        folder = root / f"killed-{line}"
        shutil.copytree(base, folder)
        child = os.fork()
        if child == 0:
            trace_saving(folder, step, line)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            raise RuntimeError(f"the save of line {line} was not killed: status {status}")
    shutil.rmtree(base)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
