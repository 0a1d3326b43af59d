"""Beginning and going on: what stands around the training loop on one process or many.

`fit` starts a run, `continue_run` resumes one, `begin_or_go_on` does what is to be done; all check
first, join the other processes of the launch, hold the run's folder, and end in `loop.train`.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.console import Console

from moebius.monitor.console import LiveDisplay
from moebius.parallel.watch import Watch, of_another_rank, watching
from moebius.parallel.world import World, enter, leave
from moebius.train.folder import RunFolder, check_place
from moebius.train.layout import check_layout
from moebius.train.loop import train
from moebius.train.resume import rejoin, reopen, resume
from moebius.train.run import Run
from moebius.train.session import Progress, check, device_of, open_stages, start

# Seconds that a process which still holds the folder may take to end.
DYING = 60.0


def fit(run: Run, out: Path | str | None = None, progress: Progress | None = None) -> Path:
    """Train a run in a new folder (`out`, or the next `runs/NAME-N`); the folder's path.

    Raises ValueError, before anything is written, where the recipe or the data cannot work.
    """
    check(run)
    check_place(Path(out) if out else Path("runs"), empty=bool(out))

    def new() -> RunFolder:
        return RunFolder.at(Path(out)) if out else RunFolder.create(Path("runs"), run.name)

    with _among_ranks(run) as world:
        prepared, loaders = open_stages(run, progress)
        with _held(world, new) as folder, _shown(run, folder, world) as (display, watch):
            session = start(run, folder, prepared, loaders, world=world)
            train(session, display, watch)
    return folder.path


def continue_run(
    path: Path | str, overrides: Iterable[str] = (), progress: Progress | None = None
) -> Path:
    """Resume the run in a folder, bit for bit as if it had never stopped; the folder's path.

    `overrides` may change run-time fields, and give the run further `stages` together with a longer
    horizon `steps`; anything else is a ValueError with both values. A folder of imported weights
    begins its run here.
    """
    folder = RunFolder.open(Path(path))
    old, run = reopen(folder, overrides)
    check(run)
    with _among_ranks(run) as world, _held(world, lambda: folder):
        _go_on(old, run, folder, progress, world)
    return folder.path


def begin_or_go_on(run: Run, out: Path | str, progress: Progress | None = None) -> Path:
    """`fit` where the folder holds no run yet, `continue_run` where it does; the folder's path.

    One command for launchers that start again what died. The recipe is checked as overrides are; a
    start that was killed before it had a run is begun anew, and a process that is still ending is
    waited for.
    """
    check(run)
    place = Path(out)

    def there() -> RunFolder:
        begun = RunFolder(place.absolute()).begun
        return RunFolder.open(place) if begun else RunFolder.at(place, half_made=True)

    with _among_ranks(run) as world, _held(world, there, wait=DYING) as folder:
        if world.any(world.main and folder.begun):
            old, new = rejoin(folder, run)
            check(new)
            _go_on(old, new, folder, progress, world)
        else:
            prepared, loaders = open_stages(run, progress)
            with _shown(run, folder, world) as (display, watch):
                session = start(run, folder, prepared, loaders, world=world)
                train(session, display, watch)
    return folder.path


def _go_on(old: Run, run: Run, folder: RunFolder, progress: Progress | None, world: World) -> None:
    with _shown(run, folder, world) as (display, watch):
        prepared, loaders = open_stages(run, progress)
        session = resume(old, run, folder, prepared, loaders, display.message, world)
        train(session, display, watch)


@contextlib.contextmanager
def _among_ranks(run: Run) -> Iterator[World]:
    """The processes of a launch, for as long as they train together."""
    try:
        world = enter(run.parallel, device_of(run))
    except RuntimeError as error:
        if not of_another_rank(error):
            raise
        raise ValueError(f"a rank was lost while all were to meet: {error}") from error
    try:
        check_layout(run, world)
        yield world
    finally:
        leave()


@contextlib.contextmanager
def _held(world: World, make: Callable[[], RunFolder], wait: float = 0.0) -> Iterator[RunFolder]:
    """The folder that the main process makes and locks, on every rank; what forbids it as well."""
    with contextlib.ExitStack() as stack:
        said = ["", ""]
        if world.main:
            try:
                folder = make()
                stack.enter_context(folder.lock(wait))
                said = [str(folder.path), ""]
            except ValueError as error:
                said = ["", str(error)]
        path, refusal = json.loads(world.told(json.dumps(said)))
        if refusal:
            raise ValueError(refusal)
        yield RunFolder(Path(path))


@contextlib.contextmanager
def _shown(run: Run, folder: RunFolder, world: World) -> Iterator[tuple[LiveDisplay, Watch]]:
    """What is shown of a run while it trains, and the watch over its ranks."""
    console = None if world.main else Console(quiet=True)
    with (
        watching(folder.ranks, world, run.parallel.patience) as watch,
        LiveDisplay(run.last_step, console) as display,
    ):
        for note in watch.notes:
            display.message(note)
        yield display, watch
