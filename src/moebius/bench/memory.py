"""Peak memory: on CUDA of torch's allocator, on Linux the process's own high-water mark.

The mark is set back by writing 5 to /proc/self/clear_refs (proc(5)), so that a peak is that of the
code between `reset` and `peak`. Elsewhere there is no such figure, and None is the honest one.
"""

import contextlib
import ctypes
import sys
from pathlib import Path
from typing import final

import torch

WHY_NONE = "peak memory is measured on CUDA and on Linux only"
_SELF = Path("/proc/self")


@final
class Memory:
    """Memory above that of the moment this was made, in bytes; None where it cannot be known."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        trim()
        self._before = self.now() or 0

    def now(self) -> int | None:
        """What is held now, by the process or on the device."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return _kilobytes("VmRSS")

    def above(self) -> int | None:
        """What is held now above the beginning."""
        now = self.now()
        return None if now is None else now - self._before

    def reset(self) -> None:
        """Forget the peak so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif sys.platform == "linux":
            with contextlib.suppress(OSError):
                (_SELF / "clear_refs").write_text("5")

    def peak(self) -> int | None:
        """The most that was held since `reset`, above the beginning."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        most = _kilobytes("VmHWM")
        return None if most is None else most - self._before


def _kilobytes(name: str) -> int | None:
    """A line of the process's status, in bytes."""
    if sys.platform != "linux":
        return None
    try:
        lines = (_SELF / "status").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{name}:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def trim() -> None:
    """Give freed memory back to the system, where the C library can, so that it counts once."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
