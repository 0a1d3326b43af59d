"""A document of 1 GB: split, kept whole, in bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moebius.data.documents import digest

from .conftest import write_folder

CHILD = """
import json, sys
import torch
from moebius.bench.memory import Memory
from moebius.data.config import DataConfig
from moebius.data.prepare import prepare
memory = Memory(torch.device("cpu"))
prepared = prepare(DataConfig(path=sys.argv[1], cache=sys.argv[2]), 512)
grown = memory.peak()
source = prepared.manifest["sources"][0]
facts = {"grown": grown, "split": source["split"]}
facts["bytes"] = source["train"]["bytes"] + source["heldout"]["bytes"]
facts["documents"] = source["train"]["documents"] + source["heldout"]["documents"]
print(json.dumps(facts))
"""


@pytest.mark.parametrize("megabytes", [pytest.param(4), pytest.param(1000, marks=pytest.mark.slow)])
def test_a_huge_document_in_bounded_memory(tmp_path: Path, megabytes: int) -> None:
    folder = write_folder(tmp_path / "texts", 20)
    small = sum(path.stat().st_size for path in folder.rglob("*.txt"))
    assert digest("huge.txt") % 10 != 0
    line = b"all of this is kept, whatever the size of the document may be\n"
    block = line * 16_000
    with (folder / "huge.txt").open("wb") as stream:
        for _ in range(megabytes):
            stream.write(block)
    command = [sys.executable, "-c", CHILD, str(folder), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert facts["bytes"] == len(block) * megabytes + small and facts["split"] == 1
    assert facts["documents"] >= megabytes * len(block) // (1 << 20)
    assert facts["grown"] < 300 << 20
