"""Saves what ranks hold between them, for `test_saving.py`. Arguments: where to write, a folder."""

import contextlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moebius import checkpoint
from moebius.checkpoint import Background, CheckpointError
from moebius.checkpoint.distributed import save_fragments
from moebius.ops.shard import Fragment
from moebius.parallel.config import Parallel
from moebius.parallel.world import World, laid_out

WIDE = torch.arange(4 * 6, dtype=torch.float32).view(4, 6)


def fragments(rank: int, value: float = 0.0) -> dict[str, list[Fragment]]:
    """A matrix in four corners, two on each rank; a vector on the first; its copy on the second."""
    x = WIDE + value
    column = 3 * rank
    corners = [Fragment(x[r : r + 2, column : column + 3], (4, 6), r, column) for r in (0, 2)]
    own = Fragment(torch.full((5,), value), (5,))
    return {"matrix": corners, ("first", "second")[rank]: [own]}


def error_of(folder: Path, step: int, found: dict[str, list[Fragment]], group: Any) -> str:
    """What a save says, in the background as well."""
    said = ""
    for background in (None, Background()):
        try:
            save_fragments(folder, step, found, {}, 2, group, background)
            if background is not None:
                background.wait()
        except CheckpointError as error:
            said += str(error)
    return said


@contextlib.contextmanager
def small_files(rank: int) -> Any:
    """The second rank may write no more than a few bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def chosen(folder: Path, world: World) -> list[Any]:
    """What each rank goes on from, and says, once a byte of the newest has changed."""
    world.wait()
    if world.main:
        file = folder / "step-00000002" / "state.json"
        file.write_bytes(file.read_bytes().replace(b"2", b"3"))
    world.wait()
    said: list[str] = []
    path = checkpoint.latest_intact(folder, say=said.append, world=world)
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, [None if path is None else path.name, said])
    return found


def main() -> None:
    out, folder = Path(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo")
    world = laid_out(Parallel().on(dist.get_world_size()), "cpu")
    rank, group = world.rank, world.savers
    assert group is not None
    save_fragments(folder, 1, fragments(rank), {"step": 1}, 2, group)
    found, background = fragments(rank, 0.5), Background()
    save_fragments(folder, 2, found, {"step": 2}, 2, group, background)
    for some in found.values():
        for each in some:
            each.tensor.fill_(-1)
    background.wait()
    with small_files(rank):
        starved = error_of(folder, 3, fragments(rank), group)
    twice = error_of(folder, 4, fragments(0) | {"second": []}, group)
    lost = error_of(folder, 5, fragments(0) if rank == 0 else {}, group)
    # As many elements as it has, but rows 1 twice and row 3 by nobody; and one below the last.
    twisted = error_of(folder, 6, {"matrix": [Fragment(WIDE[:2], (4, 6), rank)]}, group)
    outside = error_of(folder, 7, {"matrix": [Fragment(WIDE[:2], (4, 6), 3 * rank)]}, group)
    said: list[Any] = [None] * world.size
    dist.all_gather_object(said, [starved, twice, lost, twisted, outside])
    names = sorted(path.name for path in folder.iterdir())
    kept = {
        path.name: {name: x.tolist() for name, x in checkpoint.load(path)[0].items()}
        for path in checkpoint.complete(folder)
    }
    took = chosen(folder, world)
    if world.main:
        out.write_text(json.dumps({"said": said, "names": names, "kept": kept, "chosen": took}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
