"""Runs that are killed or stopped, and go on: every loss that of a run nothing ever stopped.

Ctrl-C and `stop_at` save first; `kill -9` comes during a step, or while a checkpoint is written.
"""

import random
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from moebius.checkpoint import complete

from ..running import UNJUDGED, Place, finished, lines, losses


@dataclass(frozen=True)
class Life:
    """One process on a run's folder, until it is killed; what is on the disk says how far it is."""

    run: Path
    child: subprocess.Popen[str]
    started_ns: int

    @classmethod
    def begin(cls, place: Place, run: Path) -> "Life":
        """Start the run, or go on with it."""
        if (run / "run.json").exists():
            child = place.child("train", "--resume", run)
        else:
            child = place.training(run, "steps=40", "checkpoint_every=2")
        return cls(run, child, time.time_ns())

    def until_steps(self, number: int) -> None:
        """Wait until this process has logged so many steps."""
        assert self.child.stdout is not None
        first = next(int(step) for line in self.child.stdout if (step := _begun(line)) is not None)
        path = self.run / "metrics.jsonl"
        while self.child.poll() is None and _num_lines(path) < first + number:
            pass

    def until_save(self, number: int) -> None:
        """Wait until this process is at its so-manieth checkpoint."""
        seen: set[str] = set()
        while self.child.poll() is None and len(seen) < number:
            seen |= self.writing()

    def writing(self) -> set[str]:
        """The checkpoints that this process is writing, or was when it died."""
        found: set[str] = set()
        for path in (self.run / "checkpoints").glob(".writing-step-*"):
            try:
                if path.stat().st_mtime_ns > self.started_ns:
                    found.add(path.name)
            except FileNotFoundError:
                continue  # It has just taken its name.
        return found

    def end(self, within: float) -> bool:
        """Kill it after a moment of at most so many seconds; whether it was still at work."""
        deadline = time.perf_counter() + within
        while time.perf_counter() < deadline:
            pass
        self.child.kill()
        return finished(self.child).code == -signal.SIGKILL


def _num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _begun(line: str) -> str | None:
    """The step a process starts from, where a line of its output says it."""
    match = re.match(r"continuing from step (\d+)|  data ", line)
    return (match[1] or "0") if match else None


def kill_while_saving(place: Place, run: Path, number: int, within: float = 0.0) -> bool:
    """One life that ends at a save; whether the kill hit before the checkpoint had its name."""
    life = Life.begin(place, run)
    life.until_save(number)
    assert life.end(within)
    return bool(life.writing())


def test_killed_in_a_step_and_in_a_save(place: Place, reference: Path) -> None:
    run = place.folder / "twice"
    life = Life.begin(place, run)
    life.until_steps(5)
    assert life.end(within=0.01)
    hit = any(kill_while_saving(place, run, number=2) for _ in range(4))
    assert hit, "no kill hit a save"
    done = place.cli("train", "--resume", run, UNJUDGED)
    assert done.code == 0, done.err
    assert losses(run) == losses(reference)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_ten_random_moments(seed: int, place: Place, reference: Path) -> None:
    run, chance = place.folder / f"often-{seed}", random.Random(seed)
    hits = 0
    for i in range(10):
        if i % 2:
            hits += kill_while_saving(place, run, chance.randint(1, 2), chance.uniform(0, 0.003))
        else:
            life = Life.begin(place, run)
            life.until_steps(chance.randint(0, 3))
            assert life.end(within=chance.uniform(0, 0.06))
    assert hits
    done = finished(place.child("train", "--resume", run))
    assert done.code == 0, done.err
    assert losses(run) == losses(reference)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_asked_to_stop(number: signal.Signals, place: Place, reference: Path) -> None:
    run = place.folder / number.name
    life = Life.begin(place, run)
    life.until_steps(5)
    life.child.send_signal(number)
    done = finished(life.child)
    step = lines(run)[-1]["step"]
    assert 5 <= step < 40
    assert f"stopped at step {step}; `moebius train --resume {run}` goes on" in done.out
    assert done.code == 130 and "Traceback" not in done.err
    assert complete(run / "checkpoints")[-1].name == f"step-{step:08d}"
    assert (run / "report.html").exists() and not (run / "summary.json").exists()
    assert place.cli("train", "--resume", run, UNJUDGED).code == 0
    assert losses(run) == losses(reference)


def test_stop_at_and_further(place: Place, reference: Path) -> None:
    run = place.train("staged", "steps=40", "stop_at=7")
    assert list(losses(run)) == list(range(1, 8))
    again = place.cli("train", "--resume", run)
    assert again.code == 0
    assert f"stopped at step 7; `moebius train --resume {run} stop_at=none` goes on" in again.out
    assert place.cli("train", "--resume", run, "stop_at=15").code == 0
    assert list(losses(run)) == list(range(1, 16))
    assert not (run / "summary.json").exists()
    assert place.cli("train", "--resume", run, "stop_at=none").code == 0
    assert losses(run) == losses(reference)
    assert (run / "summary.json").exists()


def test_a_finished_run_is_evaluated_again(place: Place) -> None:
    run = place.train("done", "steps=4")
    first = (run / "summary.json").read_text()
    (run / "summary.json").unlink()
    assert place.cli("train", "--resume", run).code == 0
    assert (run / "summary.json").read_text() == first
    assert list(losses(run)) == [1, 2, 3, 4]
