"""Ranks that die, hang or err: they are named, and one command goes on until the run is done.

The ways to fail are tried by two bare ranks (`failing_worker.py`); then `kill -9` hits ranks of
real runs under torchrun, whose losses must be those of runs that nothing disturbed.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moebius.parallel.compare import odd_ones
from moebius.parallel.config import Parallel
from moebius.parallel.heartbeat import (
    BEREFT,
    DONE,
    STOPPED,
    Beat,
    gone,
    last_words,
    read_beats,
    write_beat,
)
from moebius.parallel.watch import lagging, standing

from ..running import RECIPES, UNJUDGED, Place, lines, losses, tree
from .ranks import TORCHRUN, environment

WORKER = Path(__file__).with_name("failing_worker.py")
ME = socket.gethostname()


def beat(rank: int, number: int = 9, **more: Any) -> Beat:
    plain = Beat(rank, 3, "node", 70 + rank, "a", number, 2.0, 1000.0, 7, "training")
    return dataclasses.replace(plain, **more)


# --- what beats say -------------------------------------------------------------------------------


def test_beats_are_read_as_written(tmp_path: Path) -> None:
    groups = {"0 default_pg": ("gloo:all_reduce", 12)}
    written = [beat(0), beat(2, groups=groups), beat(1, attempt="b", ended="ValueError: x")]
    for one in written:
        write_beat(tmp_path, one)
    (tmp_path / "rank-7.json").write_text('{"rank": 7')
    (tmp_path / "rank-8.json").write_text("[]")
    assert read_beats(tmp_path) == sorted(written, key=lambda one: one.rank)
    assert [one.rank for one in read_beats(tmp_path, "a")] == [0, 2]
    assert read_beats(tmp_path / "absent") == []


def test_who_is_gone() -> None:
    before = [beat(0), beat(1), beat(2)]
    assert gone(before, [beat(0, 10), beat(1), beat(2, 10)]) == [beat(1)]
    bereft = beat(0, ended=BEREFT)
    assert gone(before, [bereft, beat(1), beat(2, 10)]) == [beat(1)]
    # An error says more than silence.
    failed = beat(2, ended="OutOfMemoryError: 80 GiB")
    assert gone(before, [bereft, beat(1), failed]) == [failed]
    assert gone(before, [bereft, beat(1, ended=DONE), beat(2, ended=STOPPED)]) == []


def test_last_words() -> None:
    assert last_words([]) is None
    assert last_words([beat(0, ended=DONE), beat(1, ended=STOPPED)]) is None
    silent = "rank 1 on node (pid 71) fell silent after step 7, while training"
    assert last_words([beat(0, ended=BEREFT), beat(1)]) == f"before this start {silent}"
    error = beat(2, ended="ValueError: x", step=6)
    found = last_words([beat(0), beat(1), error])
    assert found == "before this start rank 2 on node (pid 72) ended at step 6 with ValueError: x"
    # All silent: the one that was so long before the others, or nobody.
    late = last_words([beat(0, time=1020.0), beat(1), beat(2, time=1020.0)])
    assert late == f"before this start {silent}"
    assert "all 2 ranks ended without a word at step 7" in str(last_words([beat(0), beat(1)]))


def test_who_is_behind_in_a_hang() -> None:
    def at(rank: int, shard: int, experts: int | None) -> Beat:
        groups = {"1 shard": ("gloo:all_reduce", shard)}
        if experts is not None:
            groups[f"2 experts{rank // 2}"] = ("gloo:all_to_all", experts)
        return beat(rank, groups=groups)

    # Rank 1 has not begun what ranks 0 and 2 have; of experts, 2 groups count for themselves.
    beats = [at(0, 8, 4), at(1, 7, 4), at(2, 8, 3), at(3, 8, 3)]
    assert [one.rank for one in lagging(beats)] == [1]
    assert lagging([at(0, 8, 4), at(1, 8, 4)]) == []
    assert [one.rank for one in lagging([beat(0), beat(1, step=6)])] == [1]
    texts = standing([at(0, 8, None), at(1, 7, None), at(2, 8, None)])
    assert texts == [
        "ranks 0, 2 at step 7 (training), last begun gloo:all_reduce 8 of 1 shard",
        "rank 1 at step 7 (training), last begun gloo:all_reduce 7 of 1 shard",
    ]


def test_odd_replicas() -> None:
    names, ranks = ["a", "b"], [1, 3, 5]
    assert odd_ones(names, [[1, 2], [1, 2], [1, 2]], ranks) == {}
    assert odd_ones(names, [[1, 2], [1, 2], [1, 4]], ranks) == {5: ["b"]}
    assert odd_ones(names, [[1, 2], [9, 2], [7, 4]], ranks) == {
        1: ["a"],
        3: ["a"],
        5: ["a", "b"],
    }
    assert odd_ones(names, [[1, 2], [1, 4]], ranks[:2]) == {1: ["b"], 3: ["b"]}


def test_fields_are_checked() -> None:
    with pytest.raises(ValueError, match=r"parallel\.patience must be above 0"):
        Parallel(patience=0.0)
    with pytest.raises(ValueError, match="compares replicas; set dp_replicate above 1"):
        Parallel(compare_every=5)
    with pytest.raises(ValueError, match="at least 1"):
        Parallel(dp_replicate=2, compare_every=0)
    # They change no bit of a run.
    assert Parallel(dp_replicate=2, compare_every=5, patience=None) == Parallel(dp_replicate=2)


# --- ranks that fail ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What came of each way to fail, and its folder."""
    folder = tmp_path_factory.mktemp("failed")
    command = [sys.executable, WORKER, folder / "result.json", folder]
    subprocess.run([str(part) for part in command], env=environment(), check=True)
    return json.loads((folder / "result.json").read_text()), folder


def test_a_killed_rank_is_named(failed: tuple[dict[str, Any], Path]) -> None:
    first, second = failed[0]["killed"]
    assert (first["code"], second["code"]) == (2, -signal.SIGKILL)
    name = f"rank 1 on {ME} (pid {second['pid']})"
    assert f"moebius: {name} fell silent after step " in first["words"]
    assert "--go-on goes on from the last checkpoint" in first["words"]
    assert len(first["words"].splitlines()) == 1
    words = last_words(read_beats(failed[1] / "killed" / "ranks"))
    assert words is not None and name in words


def test_a_frozen_rank_is_named(failed: tuple[dict[str, Any], Path]) -> None:
    """Its connections stay, so that no collective fails: the watch of the rank before it ends."""
    first, second = failed[0]["frozen"]
    assert first["code"] == 2
    assert f"rank 1 on {ME} (pid {second['pid']}) fell silent after step " in first["words"]


def test_a_hang_is_named_with_its_collective(failed: tuple[dict[str, Any], Path]) -> None:
    result, folder = failed
    who = f"rank 1 on {ME} (pid {result['hanging'][1]['pid']})"
    said = [one["words"] for one in result["hanging"] if one["words"]]
    assert said and all(f"the others wait for {who}: " in words for words in said)
    assert all("no step has ended for " in words for words in said)
    assert all("rank 0 at step 3 (training), last begun gloo:all_reduce" in w for w in said)
    traces = [path.read_text() for path in (folder / "hanging" / "ranks").glob("rank-*.txt")]
    assert traces and all("most recent call first" in trace for trace in traces)


def test_an_error_of_one_rank_is_said_by_the_other(failed: tuple[dict[str, Any], Path]) -> None:
    first, second = failed[0]["erring"]
    assert (first["code"], second["code"]) == (2, 2)
    assert "moebius: no such document" in second["words"]
    said = f"rank 1 on {ME} (pid {second['pid']}) ended at step 3 with ValueError: no such document"
    assert first["words"].startswith(f"moebius: {said}; rank 0 was at step 3; ")


def test_replicas_that_differ_by_a_bit(failed: tuple[dict[str, Any], Path]) -> None:
    for one in failed[0]["corrupt"]:
        assert one["code"] == 2
        assert "replicas disagree at step 40: rank 0 in d and 1 more; rank 1 in d" in one["words"]
        assert "every checkpoint after step 30" in one["words"]


def test_ranks_that_end_well_say_nothing(failed: tuple[dict[str, Any], Path]) -> None:
    assert [(one["code"], one["words"]) for one in failed[0]["well"]] == [(0, ""), (0, "")]
    beats = read_beats(failed[1] / "well" / "ranks")
    assert [one.ended for one in beats] == [DONE, DONE]
    assert tree(failed[1] / "well" / "ranks") == ["rank-0.json", "rank-1.json"]


# --- one command ----------------------------------------------------------------------------------


def train(place: Place, out: Path, *fields: str) -> list[str | Path]:
    """The command, without `moebius`, that begins a run of `tiny` or goes on with it."""
    recipe = f"{RECIPES}:tiny"
    return ["train", recipe, *place.fields(UNJUDGED, *fields), "--out", out, "--go-on"]


def test_the_same_command_begins_and_goes_on(place: Place) -> None:
    whole, run = place.train("whole", UNJUDGED), place.folder / "again"
    run.mkdir()
    # What a start leaves that was killed before it had a run.
    for name in (".lock", ".writing-run.json", "tokenizer.json"):
        (run / name).write_text("torn")
    (run / "ranks").mkdir()
    (run / "code").mkdir()
    assert place.cli(*train(place, run, "stop_at=5")).code == 0
    assert list(losses(run)) == [1, 2, 3, 4, 5]
    done = place.cli(*train(place, run))
    assert "continuing from step 5" in done.out
    assert losses(run) == losses(whole)


def test_go_on_refuses_another_run(place: Place, tmp_path: Path) -> None:
    run = place.folder / "own"
    assert place.cli(*train(place, run, "stop_at=2")).code == 0
    before = tree(run)
    error = place.cli(*train(place, run, "seed=3")).error
    assert "this run cannot change seed: 0 -> 3" in error
    assert tree(run) == before
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty" in place.cli(*train(place, tmp_path)).error
    assert place.cli("train", "quickstart", "--go-on").error.startswith("--go-on needs a recipe")
    resumed = place.cli("train", "--resume", run, "--go-on")
    assert resumed.error.startswith("--go-on needs a recipe")


def test_go_on_knows_the_users_files_by_what_is_in_them(place: Place, tmp_path: Path) -> None:
    own, run = tmp_path / "mine.py", tmp_path / "run"
    shutil.copy(RECIPES, own)
    fields = place.fields(f"evaluation={own}:no_evaluation")
    command = ["train", f"{own}:tiny", *fields, "--out", run, "--go-on"]
    assert place.cli(*command, "stop_at=2").code == 0
    assert place.cli(*command, "stop_at=3").code == 0
    assert list(losses(run)) == [1, 2, 3]
    assert len(list((run / "code").iterdir())) == 1


# --- kill -9 under torchrun -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Launch:
    """A run under torchrun, and the ranks it has."""

    run: Path
    child: subprocess.Popen[bytes]
    said: Path

    @classmethod
    def begin(cls, ranks: int, restarts: int, run: Path, command: list[str | Path]) -> "Launch":
        """Start it."""
        said = run.with_suffix(".log")
        launcher = [*TORCHRUN, f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        parts = [*launcher, "-m", "moebius", *command]
        with said.open("wb") as out:
            child = subprocess.Popen(
                [str(part) for part in parts], env=environment(), stdout=out, stderr=out
            )
        return cls(run, child, said)

    def beats(self, since: str, size: int) -> list[Beat]:
        """The ranks of the first start after that one, once all are there."""
        for _ in self.moments():
            beats = read_beats(self.run / "ranks")
            attempts = {one.attempt for one in beats}
            if len(beats) == size and len(attempts) == 1 and attempts.isdisjoint({since}):
                return beats
        raise AssertionError(f"it ended: {self.said.read_text()[-4000:]}")

    def moments(self) -> Iterator[None]:
        """Again and again while it lives."""
        while not self.over(0.02):
            yield

    def over(self, within: float) -> bool:
        """Whether it ends within so many seconds."""
        try:
            self.child.wait(within)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self) -> str:
        """Wait for it; what it said."""
        self.child.wait(600)
        said = self.said.read_text()
        assert self.child.returncode == 0, said[-4000:]
        return said


def test_one_of_two_is_killed_and_one_goes_on_alone(place: Place) -> None:
    """Two replicas that are compared; then one process ends what they began."""
    exact = ["precision=fp64", "checkpoint_every=3", "steps=14"]
    both = ["parallel.dp_replicate=2", "parallel.compare_every=2", "parallel.patience=20"]
    whole, run = place.train("exact", UNJUDGED, *exact), place.folder / "killed"
    launch = Launch.begin(2, 1, run, train(place, run, *exact, *both, "stop_at=10"))
    for _ in launch.moments():
        if (run / "metrics.jsonl").exists() and len(lines(run)) >= 4:
            break
    victim = launch.beats("", 2)[random.Random(0).randrange(2)]
    os.kill(victim.pid, signal.SIGKILL)
    said = launch.end()
    # By the other rank, or, where torchrun was quicker to end that one, at the next start.
    words = f"rank {victim.rank} on {ME} (pid {victim.pid}) fell silent after step "
    assert words in said
    events = [line["message"] for line in lines(run, "events.jsonl") if line["kind"] == "lost"]
    assert len(events) == 1 and events[0].startswith(f"before this start {words}")
    assert list(losses(run)) == list(range(1, 11))
    alone = place.cli(*train(place, run, *exact, "parallel.compare_every=none"))
    assert alone.code == 0, alone.err
    check_near(run, whole)


def test_a_killed_stage_of_a_pipeline_is_named(place: Place) -> None:
    """The other one hears of it inside torch's schedule, which wraps errors in its own.

    They have no launcher, which would be quicker at times to end it than it is to speak.
    """
    run = place.folder / "stages"
    fields = ["steps=20", "checkpoint_every=2", "parallel.pp=2", "parallel.patience=20", UNJUDGED]
    command = ["train", f"{RECIPES}:tower", *place.fields(*fields), "--out", run, "--go-on"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-m", "moebius", *map(str, command)],
            env={**environment(), **where, "RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    )
    while not ((run / "metrics.jsonl").exists() and len(lines(run)) >= 4):
        with contextlib.suppress(subprocess.TimeoutExpired):
            first.wait(0.02)
            break
    second.kill()
    said = first.communicate(timeout=300)[1]
    second.communicate()
    assert first.returncode == 2, said[-4000:]
    assert f"moebius: rank 1 on {ME} (pid {second.pid}) fell silent after step " in said
    Launch.begin(2, 0, run, command).end()
    assert list(losses(run)) == list(range(1, 21))


def check_near(run: Path, whole: Path) -> None:
    """Equal losses, but for rounding in fp64."""
    found, expected = losses(run), losses(whole)
    assert found.keys() == expected.keys()
    for step, text in expected.items():
        value = float.fromhex(text)
        assert abs(float.fromhex(found[step]) - value) <= 1e-10 * abs(value), step


@pytest.mark.slow
def test_one_of_four_is_killed_ten_times(place: Place) -> None:
    """FSDP x EP in fp32: bit for bit the losses of four ranks that nothing disturbed."""
    fields = ["steps=300", "batch=8", "checkpoint_every=2", "parallel.ep=2", "parallel.patience=20"]
    whole, run = place.folder / "calm", place.folder / "often"
    Launch.begin(4, 0, whole, train(place, whole, *fields)).end()
    chance, attempt, killed = random.Random(0), "", list[str]()
    launch = Launch.begin(4, 10, run, train(place, run, *fields))
    for _ in range(10):
        beats = launch.beats(attempt, 4)
        assert not launch.over(chance.uniform(0, 4))
        victim = chance.choice(beats)
        os.kill(victim.pid, signal.SIGKILL)
        attempt = victim.attempt
        killed.append(f"rank {victim.rank} on {ME} (pid {victim.pid})")
    said = launch.end()
    assert losses(run) == losses(whole)
    # By another rank, or, where torchrun ended the others while they set up, at the next start.
    assert [name for name in killed if name not in said] == []
    lost = [line for line in lines(run, "events.jsonl") if line["kind"] == "lost"]
    assert lost and all("fell silent" in line["message"] for line in lost)
