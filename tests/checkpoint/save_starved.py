"""Saves without room: run by test_starved.py in a process of its own, which gets little of it.

Prints as JSON the error of the second save and what the folder holds afterwards.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from moebius.checkpoint import CheckpointError, complete, save, verify


def main(folder: Path, shortage: str) -> None:
    """Save a small checkpoint, bring the shortage about, save one of 4 MB, then a small one."""
    save(folder, 10, {"w": torch.ones(10)}, {}, keep=1)
    if shortage == "file-limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    if shortage == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", folder.parent], check=True)
    message = ""
    try:
        save(folder, 20, {"w": torch.ones(1 << 20)}, {}, keep=1)
    except CheckpointError as error:
        message = str(error)
    names = sorted(path.name for path in folder.iterdir())
    for path in complete(folder):
        verify(path)
    recovered = ""
    if shortage != "read-only":
        recovered = save(folder, 30, {"w": torch.ones(10)}, {}, keep=1).name
    print(json.dumps({"message": message, "names": names, "recovered": recovered}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
