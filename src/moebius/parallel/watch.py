"""The watch that each rank keeps: it gives signs of life, and finds ranks that die or hang.

A thread writes this rank's beat and looks at that of the next rank, so that all are looked after
and nobody reads all. Llama 3 (arXiv 2407.21783, 3.3.4) finds slow and dead ranks by what NCCL's
flight recorder says of them; here torch's own recorder is asked, on gloo as well.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any, final

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from moebius.parallel.heartbeat import (
    BEREFT,
    DONE,
    STOPPED,
    Beat,
    clear_beats,
    gone,
    last_words,
    read_beat,
    read_beats,
    write_beat,
)
from moebius.parallel.world import SAVERS, World, leave

# Seconds between two beats at most where no step ends, and how many a rank may miss in turn.
EVERY = 2.0
MISSED, MISSED_ONCE_BROKEN = 20, 3
# The flight recorders of torch: one for gloo, one for NCCL in builds that have it.
RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
# What a rank is at while all wait for a checkpoint.
SAVING = "saving"
GO_ON = "the same command with --go-on goes on from the last checkpoint"


@final
class Watch:
    """One rank's watch. Attributes are set by the main thread and read by the watching one."""

    def __init__(
        self,
        folder: Path,
        world: World,
        attempt: str,
        patience: float | None,
        notes: tuple[str, ...],
    ) -> None:
        self.folder, self.rank, self.size, self.attempt = folder, world.rank, world.size, attempt
        # What is to be known of the attempt before this one.
        self.notes = notes
        self._patience = patience
        self._every = EVERY if patience is None else min(EVERY, patience / (2 * MISSED))
        self._step, self._doing, self._ended = 0, "starting", None
        # Whether dead ranks are looked for; and hangs, which set-up and evaluation may look like.
        self._judging, self._paced = patience is not None, False
        self._since, self._number = time.monotonic(), 0
        self._next, self._missed = -1, 0
        self._over, self._news, self._writing = Event(), Event(), threading.RLock()
        self._old: Any = None
        self._thread = threading.Thread(target=self._keep, name="watch", daemon=True)

    def at(self, step: int, doing: str = "training") -> None:
        """So many steps are done: what counts as a sign that nothing hangs."""
        self._step, self._doing, self._since = step, doing, time.monotonic()
        self._paced = True
        self._news.set()

    def rest(self, doing: str) -> None:
        """No steps follow: from now on nothing is taken for a hang."""
        self._doing, self._paced = doing, False

    def begin(self) -> None:
        """Give the first sign, and all later ones from a thread."""
        if threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, self._stopped)
        self._beat()
        self._thread.start()

    def _stopped(self, number: int, _: object) -> None:
        """Die of a signal as ever, but say before that another process wished it."""
        self._ended, self._judging = STOPPED, False
        self._beat()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def end(self, error: BaseException | None) -> ValueError | None:
        """The last sign; where another rank was lost, the error that names it."""
        self._judging = False
        broken = error is not None and of_another_rank(error)
        self._ended = BEREFT if broken else _ending(error)
        self._beat()
        found = None
        if broken:
            with _unstopped():
                # So that ranks which wait for this one hear of it.
                leave()
                found = ValueError(f"{self._blame(error)}; {GO_ON}")
        self._over.set()
        self._news.set()
        self._thread.join()
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)
        return found

    def _blame(self, error: BaseException | None) -> str:
        """Who is to blame that a collective broke: found by looking on for a few beats."""
        before, deadline = self._others(), time.monotonic() + MISSED_ONCE_BROKEN * self._every
        while not (failed := gone((), self._others())) and time.monotonic() < deadline:
            self._beat()
            self._over.wait(self._every / 4)
        if blamed := failed or gone(before, self._others()):
            fates = "; ".join(beat.fate() for beat in blamed)
            return f"{fates}; rank {self.rank} was at step {self._step}"
        said = _line(error) or "no rank says why"
        return f"other ranks ended while rank {self.rank} was at step {self._step}: {said}"

    def _others(self) -> list[Beat]:
        beats = read_beats(self.folder, self.attempt)
        return [beat for beat in beats if beat.rank != self.rank]

    # --- the thread -------------------------------------------------------------------------------

    def _keep(self) -> None:
        judged = time.monotonic()
        while not self._over.wait(self._every / 10):
            self._news.wait(self._every)
            self._news.clear()
            if self._over.is_set():
                return
            self._beat()
            if self._judging and time.monotonic() - judged >= self._every:
                judged = time.monotonic()
                self._judge()

    def _beat(self) -> None:
        with self._writing:
            self._number += 1
            half = self._patience is not None and self._stalled() > self._patience / 2
            groups = recorded(self._doing == SAVING) if half and self._paced else {}
            place = (self.rank, self.size, socket.gethostname(), os.getpid(), self.attempt)
            sign = (self._number, self._every, time.time(), self._step, self._doing, self._ended)
            # A disk that is full or away for a moment is no reason to stop.
            with contextlib.suppress(OSError):
                write_beat(self.folder, Beat(*place, *sign, groups))

    def _stalled(self) -> float:
        return time.monotonic() - self._since

    def _judge(self) -> None:
        """End this process where the next rank is gone, or no step ends any more."""
        assert self._patience is not None
        following = (self.rank + 1) % self.size
        found = read_beat(self.folder, following, self.attempt)
        number = -1 if found is None else found.number
        over = found is not None and found.ended is not None
        self._missed = self._missed + 1 if number == self._next else 0
        self._next = number
        if found is not None and found.ended == DONE:
            self._missed = 0
        if self._missed >= (MISSED_ONCE_BROKEN if over else MISSED):
            self._exit(self._blame(None))
        if self._paced and self._stalled() > self._patience:
            self._exit(self._hang())

    def _hang(self) -> str:
        """Which ranks are behind, and where all of them stand."""
        beats = read_beats(self.folder, self.attempt)
        behind = lagging(beats)
        text = f"no step has ended for {self._stalled():.0f} s"
        if behind:
            names = ", ".join(beat.who() for beat in behind)
            text += f"; the others wait for {names}"
        return f"{text}: {'; '.join(standing(beats))}"

    def _exit(self, text: str) -> None:
        """End the process from the watching thread: the main one may never come back."""
        self._ended, self._judging = BEREFT, False
        self._beat()
        with contextlib.suppress(OSError), (self.folder / f"rank-{self.rank}.txt").open("w") as out:
            out.write(f"{text}\n\n")
            out.flush()
            faulthandler.dump_traceback(out, all_threads=True)
        print(f"moebius: {text}; {GO_ON}", file=sys.stderr, flush=True)
        os._exit(2)


@contextlib.contextmanager
def watching(folder: Path, world: World, patience: float | None) -> Iterator[Watch]:
    """A watch over the ranks of a run while they work; alone, nothing is written or watched.

    Where a collective broke because another rank was lost, a ValueError names it. Collective.
    """
    if world.size == 1:
        yield Watch(folder, world, "", None, ())
        return
    said = ""
    if world.main:
        folder.mkdir(exist_ok=True)
        words = last_words(read_beats(folder))
        clear_beats(folder)
        said = json.dumps([f"{time.time_ns():x}", [words] if words else []])
    attempt, notes = json.loads(world.told(said))
    watch = Watch(folder, world, attempt, patience, tuple(notes))
    watch.begin()
    try:
        yield watch
    except BaseException as error:
        lost = watch.end(error)
        if lost is not None:
            raise lost from error
        raise
    watch.end(None)


def recorded(saving: bool) -> dict[str, tuple[str, int]]:
    """By group: the collective that torch's flight recorder saw begin last, and its number.

    Those of savers only while all wait for them: whoever still writes keeps no step waiting.
    """
    found: dict[str, tuple[str, int]] = {}
    for name in RECORDERS:
        dump = getattr(c10d, name, None)
        for entry in json.loads(dump())["entries"] if dump is not None else ():
            group = " ".join(entry["process_group"])
            if saving or SAVERS not in entry["process_group"]:
                found[group] = (entry["profiling_name"], entry["collective_seq_id"])
    return found


def lagging(beats: list[Beat]) -> list[Beat]:
    """The ranks that have not begun a collective which another rank of its group has."""
    most: dict[str, int] = {}
    for beat in beats:
        for name, (_, count) in beat.groups.items():
            most[name] = max(count, most.get(name, 0))
    steps = max((beat.step for beat in beats), default=0)
    return [
        beat
        for beat in beats
        if beat.step < steps or any(count < most[n] for n, (_, count) in beat.groups.items())
    ]


def standing(beats: list[Beat]) -> list[str]:
    """Where ranks stand: one text for all that stand at the same place."""
    places: dict[str, list[int]] = {}
    for beat in beats:
        last = [f"{op} {count} of {name}" for name, (op, count) in sorted(beat.groups.items())]
        place = f"at step {beat.step} ({beat.doing}), last begun {', '.join(last) or 'nothing'}"
        places.setdefault(place, []).append(beat.rank)
    return [
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} {place}"
        for place, ranks in places.items()
    ]


def of_another_rank(error: BaseException) -> bool:
    """Whether a collective failed, which gloo says by a RuntimeError that names itself."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def _ending(error: BaseException | None) -> str:
    if error is None:
        return DONE
    if isinstance(error, KeyboardInterrupt):
        return STOPPED
    return f"{type(error).__name__}: {_line(error)}"


def _line(error: BaseException | None) -> str:
    return next(iter(str(error).splitlines()), "")


@contextlib.contextmanager
def _unstopped() -> Iterator[None]:
    """A launcher that ends all ranks because one died gives them time; use it to say which."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
