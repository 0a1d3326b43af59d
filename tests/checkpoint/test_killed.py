"""A save killed at any moment leaves the old checkpoint or the new one, never nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moebius.checkpoint import complete, latest_intact, load, save

SCRIPT = Path(__file__).with_name("save_killed.py")
ROUNDS = 40


def content(step: int, version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + version)
    return {f"layer.{i}": torch.randn(300, generator=generator) for i in range(4)}


@pytest.mark.parametrize("step", [20, 10], ids=["the next step", "the same step again"])
def test_killed_at_any_line_of_a_save(tmp_path: Path, step: int) -> None:
    subprocess.run([sys.executable, SCRIPT, tmp_path, str(step), str(ROUNDS)], check=True)
    outcomes = set()
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == ROUNDS
    for folder in folders:
        said: list[str] = []
        newest = latest_intact(folder, say=said.append)
        assert newest is not None and said == []
        assert newest == complete(folder)[-1]
        tensors, state = load(newest)
        outcomes.add((state["step"], state["version"]))
        expected = content(state["step"], state["version"])
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        save(folder, 30, content(30, 0), {}, keep=2)
        left = [path.name for path in folder.iterdir()]
        assert sorted(left) == [f"step-{state['step']:08d}", "step-00000030"]
    assert outcomes == {(10, 0), (step, 1)}
