"""Freed memory stays with the process: the next step does not ask the system for it again."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from moebius.ops.native.memory import keep_freed_memory

if sys.argv[1] == "keep":
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


def faults(how: str) -> int:
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_kept() -> None:
    assert faults("keep") < faults("free") / 10
