"""Two ranks that fail in every way: forked from one process, because importing torch is what costs.

Each way is a function that a rank calls within its watch, some steps after its start. What each
rank said and its exit code go, by way and rank, to the path given first; files to the folder given
second.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moebius.parallel.compare import check_replicas, disagreement
from moebius.parallel.config import Parallel
from moebius.parallel.watch import watching
from moebius.parallel.world import World, enter, leave

PATIENCE, STEPS = 4.0, 3


def killed(world: World) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def frozen(world: World) -> None:
    """The whole process stands still, and its connections stay."""
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def hanging(world: World) -> None:
    if world.rank == 1:
        threading.Event().wait()


def erring(world: World) -> None:
    if world.rank == 1:
        raise ValueError("no such document\nthe rest")


def corrupt(world: World) -> None:
    weight = torch.full((5,), 0.25)
    same = {"a": weight.bfloat16(), "b": torch.arange(4), "c": torch.tensor(0.5)}
    assert disagreement(same, world) is None
    weight.view(torch.int32)[3] ^= world.rank  # The least bit of one element.
    check_replicas({**same, "d": weight, "e": weight}, world, 40, 10)


def well(_: World) -> None:
    """Nothing is wrong."""


WAYS: dict[str, Callable[[World], None]] = {
    way.__name__: way for way in (killed, frozen, hanging, erring, corrupt, well)
}


def live(rank: int, way: str, port: int, folder: Path) -> int:
    """One rank; its exit code."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ.update(place, MASTER_PORT=str(port))
    parallel = Parallel(dp_replicate=2, dp_shard=1, patience=PATIENCE)
    try:
        world = enter(parallel, torch.device("cpu"))
        try:
            with watching(folder / "ranks", world, parallel.patience) as watch:
                for step in range(2 * STEPS):
                    watch.at(step)
                    if step == STEPS:
                        WAYS[way](world)
                    world.any(False)
        finally:
            leave()
    except ValueError as error:
        print(f"moebius: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def fork(rank: int, way: str, port: int, folder: Path) -> int:
    """Start a rank; its process id."""
    if pid := os.fork():
        return pid
    with (folder / f"{rank}.err").open("w") as err:
        os.dup2(err.fileno(), 2)
        code = live(rank, way, port, folder)
        sys.stderr.flush()
    os._exit(code)


def tried(way: str, folder: Path) -> list[Any]:
    """What came of a way: exit code (or minus the signal) and words of each rank."""
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pids = [fork(rank, way, port, folder) for rank in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1])]
    if way in ("frozen", "hanging"):
        # A launcher would.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[1], signal.SIGKILL)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pids[1], 0)[1]))
    words = [(folder / f"{rank}.err").read_text() for rank in range(2)]
    return [{"pid": pids[i], "code": codes[i], "words": words[i]} for i in range(2)]


if __name__ == "__main__":
    result, place = Path(sys.argv[1]), Path(sys.argv[2])
    result.write_text(json.dumps({way: tried(way, place / way) for way in WAYS}))
