"""Freed memory stays with the process: the next step does not ask the system for it again."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from moebius.ops.native.memory import keep_freed_memory

keep_freed_memory()

def step():
    held = [torch.ones(1_000_000 + 100_000 * i) for i in range(20)]

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
# Pages of what those five steps hold.
PAGES = 5 * sum(4 * (1_000_000 + 100_000 * i) for i in range(20)) // 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_kept() -> None:
    """What the system gives without being asked to keep anything depends on the heap's layout."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True)
    assert int(done.stdout) < PAGES / 100
