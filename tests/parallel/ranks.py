"""Starting ranks as a user does, by torchrun, and reading what they found.

A worker is a script beside the tests: each rank runs it, and rank 0 writes one JSON value to the
path it is given first. One launch costs seconds, so a worker visits many layouts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def environment() -> dict[str, str]:
    """One thread a rank: several ranks share the cores of a test. They import what it imports."""
    paths = os.pathsep.join([str(ROOT), *sys.path])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def launch(ranks: int, worker: str, out: Path, *arguments: str | Path) -> Any:
    """What rank 0 of a worker beside this file wrote, started on so many ranks."""
    script = Path(__file__).with_name(worker)
    command = [*TORCHRUN, f"--nproc-per-node={ranks}", script, out, *arguments]
    done = subprocess.run(
        [str(part) for part in command],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())
