"""Saving while the run goes on: what was there when it was asked for; errors; one at a time."""

import threading
from pathlib import Path

import pytest
import torch

from moebius import checkpoint
from moebius.checkpoint import Background, CheckpointError


def test_what_changes_afterwards_is_not_saved(tmp_path: Path) -> None:
    x, saver = torch.arange(6.0), Background()
    saver.save(tmp_path, 4, {"x": x}, {"step": 4}, keep=1)
    x.fill_(-1)
    saver.wait()
    tensors, state = checkpoint.load(checkpoint.complete(tmp_path)[-1])
    assert torch.equal(tensors["x"], torch.arange(6.0)) and state == {"step": 4}


def test_one_after_the_other(tmp_path: Path) -> None:
    saver = Background()
    for step in range(5):
        saver.save(tmp_path, step, {"x": torch.full((100_000,), float(step))}, {}, keep=2)
        assert sum(thread.name.startswith("checkpoint") for thread in threading.enumerate()) <= 1
    saver.wait()
    assert [path.name for path in checkpoint.complete(tmp_path)] == [
        "step-00000003",
        "step-00000004",
    ]


def test_what_went_wrong_is_said_once_and_the_next_may_work(tmp_path: Path) -> None:
    saver, odd = Background(), {"loss": float("nan")}
    saver.save(tmp_path, 1, {"x": torch.ones(2)}, odd, keep=1)
    with pytest.raises(CheckpointError, match=r"state\.loss is nan"):
        saver.wait()
    saver.wait()
    assert not saver.failed
    saver.save(tmp_path, 2, {"x": torch.ones(2)}, odd, keep=1)
    while saver.busy:
        pass
    assert saver.failed
    with pytest.raises(CheckpointError, match=r"state\.loss is nan"):
        saver.wait()
    assert not saver.failed
    saver.save(tmp_path, 3, {"x": torch.ones(2)}, {}, keep=1)
    saver.wait()
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000003"]


def test_a_tensor_that_cannot_be_saved_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no torch\.complex64"):
        Background().save(tmp_path, 1, {"x": torch.ones(2, dtype=torch.complex64)}, {}, keep=1)
