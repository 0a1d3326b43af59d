"""A checkpoint is one of the run, not of its layout: it goes on with any other number of ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moebius import checkpoint

from ..running import COMMAND, RECIPES, UNJUDGED
from .ranks import TORCHRUN, environment


def train(ranks: int, *arguments: str | Path) -> None:
    """`moebius train` as a user runs it: on one process, or by torchrun."""
    start = [*TORCHRUN, f"--nproc-per-node={ranks}", "-m", "moebius"] if ranks > 1 else COMMAND
    command = [str(part) for part in (*start, "train", *arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: float.fromhex(line["loss_hex"]) for line in lines}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    found, _ = checkpoint.load(checkpoint.complete(run / "checkpoints")[-1])
    return {name: x for name, x in found.items() if not name.startswith("random.")}


def check_equal(whole: Path, moved: Path, steps: int) -> None:
    """Equal losses of so many steps, and equal states in the end, but for rounding in fp64."""
    want, seen = losses(whole), losses(moved)
    assert seen.keys() == want.keys() == set(range(1, steps + 1))
    for step, loss in want.items():
        assert seen[step] == pytest.approx(loss, rel=1e-10)
    one, other = tensors(whole), tensors(moved)
    assert one.keys() == other.keys()
    for name, x in one.items():
        torch.testing.assert_close(other[name], x, rtol=1e-9, atol=1e-12, msg=name)


@pytest.fixture(scope="module")
def fields(corpus: Path, cache: Path) -> list[str]:
    where = [f"data.path={corpus}", f"data.cache={cache}"]
    return [f"{RECIPES}:tiny", *where, "precision=fp64", "steps=9", UNJUDGED]


def test_four_ranks_then_two_then_one_then_two(tmp_path: Path, fields: list[str]) -> None:
    train(1, *fields, "--out", tmp_path / "whole")
    run = tmp_path / "moved"
    train(4, *fields, "parallel.ep=2", "stop_at=3", "--out", run)
    train(2, "--resume", run, "stop_at=5")
    events = (run / "events.jsonl").read_text().splitlines()
    said = [json.loads(line)["message"] for line in events]
    assert any("bit from here on, because of another layout (2 ranks" in text for text in said)
    train(1, "--resume", run, "stop_at=6", "parallel.ep=1")
    train(2, "--resume", run, "stop_at=none", "parallel.ep=2", "parallel.dp_shard=2")
    check_equal(tmp_path / "whole", run, 9)


@pytest.mark.slow
def test_from_eight_ranks_to_any_other_layout(tmp_path: Path, fields: list[str]) -> None:
    """Whole weights and experts over 8 ranks, then 1, 2 and 4, a tensor group, stages, and back."""
    tower = [f"{RECIPES}:tower", *fields[1:], "batch=8", "micro_batch=1", "steps=7"]
    train(1, *tower, "--out", tmp_path / "whole")
    run, plain = tmp_path / "moved", ("parallel.ep=1", "parallel.tp=1", "parallel.pp=1")
    train(8, *tower, "parallel.ep=4", "stop_at=1", "--out", run)
    train(1, "--resume", run, *plain, "stop_at=2")
    train(2, "--resume", run, *plain, "parallel.ep=2", "stop_at=3")
    train(4, "--resume", run, *plain, "parallel.ep=2", "stop_at=4")
    train(2, "--resume", run, *plain, "parallel.tp=2", "stop_at=5")
    train(4, "--resume", run, *plain, "parallel.pp=2", "stop_at=6")
    train(8, "--resume", run, *plain, "parallel.ep=4", "stop_at=none")
    check_equal(tmp_path / "whole", run, 7)


def test_the_same_layout_repeats_and_goes_on_to_the_bit(tmp_path: Path, fields: list[str]) -> None:
    """In fp32: once over all steps, once stopped and gone on with; every tensor is the same."""
    layout = [*fields, "precision=fp32", "parallel.ep=2"]
    train(2, *layout, "--out", tmp_path / "whole")
    train(2, *layout, "stop_at=4", "--out", tmp_path / "halved")
    train(2, "--resume", tmp_path / "halved", "stop_at=none")
    assert losses(tmp_path / "whole") == losses(tmp_path / "halved")
    whole, halved = tensors(tmp_path / "whole"), tensors(tmp_path / "halved")
    assert whole.keys() == halved.keys()
    assert all(torch.equal(x, halved[name]) for name, x in whole.items())


def test_a_precision_that_is_chosen_is_that_of_the_ranks(tmp_path: Path, fields: list[str]) -> None:
    """Weights are gathered as if it had been asked for, at the start and when the run goes on."""
    asked, auto = tmp_path / "asked", tmp_path / "auto"
    train(2, *fields, "precision=auto", "stop_at=3", "--out", auto)
    train(2, "--resume", auto, "stop_at=none")
    chosen = json.loads((auto / "run.json").read_text())["precision"]
    train(2, *fields, f"precision={chosen}", "--out", asked)
    assert chosen in ("bf16", "fp32") and losses(auto) == losses(asked)


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path: Path, fields: list[str]) -> None:
    command = [sys.executable, "-m", "moebius", "train", *fields, "batch=5"]
    two = {**environment(), "RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")],
        env={**os.environ, **two},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "a batch of 5 sequences cannot be shared equally by 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("parallel.ep=3", "parallel.ep=3 must divide dp_shard"),
        ("parallel.dp_shard=4", "is 1 x 4, but there are 1 processes"),
        ("parallel.ep=0", "parallel.ep must be at least 1"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(
    override: str, said: str, tmp_path: Path, fields: list[str]
) -> None:
    command = [sys.executable, "-m", "moebius", "train", *fields, override]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and said in done.stderr
    assert not (tmp_path / "run").exists()
