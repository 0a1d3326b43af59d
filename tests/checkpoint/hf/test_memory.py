"""Import and export hold little more than the largest tensor, however large the model.

The bound is 1.3 times the larger of the largest shard and the largest tensor written, above what
the process holds before it begins; measured in a process of its own, on shards of 25 MB.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from .folders import CONFIG, random_tensors, tiny_folder, write_folder

LARGE = {
    **CONFIG,
    "vocab_size": 9000,
    "hidden_size": 1024,
    "intermediate_size": 4608,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
MEASURE = """
import json, sys
from pathlib import Path
from moebius.checkpoint.hf.exporter import export_hf
from moebius.checkpoint.hf.importer import import_hf

def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))

def measured(work):
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew
    work()
    return resident("VmHWM") - before

quiet = lambda text: None
small, large, home = map(Path, sys.argv[1:])
import_hf(small, home / "warm", say=quiet)
export_hf(home / "warm", home / "warm-out", say=quiet)
into = measured(lambda: import_hf(large, home / "run", say=quiet))
back = measured(lambda: export_hf(home / "run", home / "out", say=quiet, shard_bytes=25_000_000))
print(json.dumps([into, back]))
"""


def packed(tensors: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """In order, filled up to a limit, as publishers do."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, x in tensors.items():
        if sum(y.nbytes for y in shards[-1].values()) + x.nbytes > limit:
            shards.append({})
        shards[-1][name] = x
    return shards


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_of_import_and_export(tmp_path: Path) -> None:
    tensors = random_tensors(LARGE)
    large = write_folder(tmp_path / "large", LARGE, *packed(tensors, 25_000_000))
    small = tiny_folder(tmp_path / "small")
    command = [sys.executable, "-c", MEASURE, *map(str, (small, large, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    into, back = json.loads(done.stdout)
    largest = max(path.stat().st_size for path in large.glob("*.safetensors"))
    assert sum(x.nbytes for x in tensors.values()) > 2.5 * largest
    # Gate and up, in one tensor here, are what an import writes largest.
    assert into < 1.3 * max(largest, 2 * 4608 * 1024 * 2)
    largest = max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert back < 1.3 * max(largest, 9000 * 1024 * 2)
