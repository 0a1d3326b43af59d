"""What a training process asks of glibc's allocator: freed memory stays, and lies in huge pages.

By default every large buffer goes back to the system, which clears each of its small pages again
when the next step asks for it: a fifth of a small model's step. torch keeps freed memory on a GPU,
not on a CPU.
"""

import ctypes
import platform
from pathlib import Path

import torch

# mallopt(3) and madvise(2).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
MADV_HUGEPAGE = 14
# So far the heap is grown at once: addresses, not memory. As much as mallopt can say.
HEAP = (1 << 31) - (1 << 12)
MAPS = Path("/proc/self/maps")


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step, in huge pages; elsewhere do nothing."""
    if platform.libc_ver()[0] != "glibc" or not MAPS.exists():
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    start, end = _heap()
    if end - start >= HEAP:  # It was grown before.
        return
    libc.mallopt(M_TOP_PAD, HEAP)
    torch.empty(1 << 27, dtype=torch.uint8)
    libc.mallopt(M_TOP_PAD, 128 << 10)
    start, end = _heap()
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.madvise(start, end - start, MADV_HUGEPAGE)


def _heap() -> tuple[int, int]:
    """The addresses of the heap; two equal ones if there is none."""
    for line in MAPS.read_text().splitlines():
        if line.endswith("[heap]"):
            start, end = line.split()[0].split("-")
            return int(start, 16), int(end, 16)
    return 0, 0
