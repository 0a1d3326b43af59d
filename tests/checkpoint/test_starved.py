"""No room to save: earlier checkpoints stay, the error says what to do, nothing is left over."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.checkpoint import CheckpointError, complete, save

SCRIPT = Path(__file__).with_name("save_starved.py")
MOUNT = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'


def starve(command: list[str], shortage: str, folder: Path) -> dict[str, Any]:
    command = [*command, sys.executable, str(SCRIPT), str(folder / "checkpoints"), shortage]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def in_small_mount(folder: Path) -> list[str]:
    """A command prefix: `folder` is a file system of 1 MB, seen by that process alone."""
    prefix = ["unshare", "-rm", "sh", "-c", MOUNT, str(folder)]
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare command here, so no small file system can be mounted")
    if subprocess.run([*prefix, "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    return prefix


def check(result: dict[str, Any], reason: str, remedy: str) -> None:
    message = result["message"]
    assert "\n" not in message
    assert "cannot save step 20" in message and reason in message and remedy in message
    assert "earlier checkpoints are intact" in message
    needed = int(message.split(" bytes needed")[0].rsplit("(", 1)[1].replace(",", ""))
    assert 4 << 20 < needed < (4 << 20) + 1000
    assert result["names"] == ["step-00000010"]


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    result = starve([], "file-limit", tmp_path)
    check(result, "File too large", "ulimit -f")
    assert result["recovered"] == "step-00000030"


def test_a_full_disk(tmp_path: Path) -> None:
    result = starve(in_small_mount(tmp_path), "full", tmp_path)
    check(result, "No space left on device", "free some space")
    assert result["recovered"] == "step-00000030"


def test_a_read_only_disk(tmp_path: Path) -> None:
    result = starve(in_small_mount(tmp_path), "read-only", tmp_path)
    check(result, "Read-only file system", "make sure the folder can be written")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot save step 1 in .*: Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1, {}, {}, keep=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    save(tmp_path, 1, {"w": torch.ones(3)}, {}, keep=1)
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"cannot save step 2 .*: Permission denied"):
        save(tmp_path, 2, {"w": torch.ones(3)}, {}, keep=1)
    tmp_path.chmod(0o700)
    assert [path.name for path in complete(tmp_path)] == ["step-00000001"]
