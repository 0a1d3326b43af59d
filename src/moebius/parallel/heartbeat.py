"""What each rank leaves in the run's folder while it lives: who it is, and how far it has come.

`ranks/rank-3.json` is replaced every few seconds, without forcing it to the disk. Whether a rank
still lives is told by its count of beats going up, never by comparing the clocks of two machines.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

# How a rank may say that it ended; anything else it says is its error.
DONE, STOPPED, BEREFT = "done", "stopped", "lost another rank"


@final
@dataclasses.dataclass(frozen=True)
class Beat:
    """One rank's sign of life."""

    rank: int
    size: int
    host: str
    pid: int
    # Of one start of the ranks, as the main one named it.
    attempt: str
    # How many signs it gave before; seconds between two; the time of this one.
    number: int
    every: float
    time: float
    # Steps done, and what it is at.
    step: int
    doing: str
    # How it ended; none while it lives.
    ended: str | None = None
    # By group: the collective begun last, and how many were before. Looked up once it stalls.
    groups: Mapping[str, tuple[str, int]] = dataclasses.field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether it ended with an error of its own."""
        return self.ended not in (None, DONE, STOPPED, BEREFT)

    def who(self) -> str:
        """Which rank, and where."""
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    def fate(self) -> str:
        """How it went out, in words."""
        if self.ended is not None:
            return f"{self.who()} ended at step {self.step} with {self.ended}"
        return f"{self.who()} fell silent after step {self.step}, while {self.doing}"


def write_beat(folder: Path, beat: Beat) -> None:
    """Replace the file of a rank."""
    path = folder / f"rank-{beat.rank}.json"
    aside = path.with_name(f".writing-{path.name}")
    aside.write_text(json.dumps(dataclasses.asdict(beat)) + "\n")
    os.replace(aside, path)


def read_beats(folder: Path, attempt: str | None = None) -> list[Beat]:
    """The last sign of every rank (of one attempt) in order; what is no beat is passed over."""
    names = os.listdir(folder) if folder.is_dir() else []
    found = [
        beat
        for name in names
        if name.startswith("rank-") and name.endswith(".json")
        if (beat := _read(folder / name)) is not None
        if attempt in (None, beat.attempt)
    ]
    return sorted(found, key=lambda beat: beat.rank)


def read_beat(folder: Path, rank: int, attempt: str) -> Beat | None:
    """The last sign of one rank in an attempt."""
    # Listing makes a network file system look again for files that were replaced.
    os.listdir(folder)
    beat = _read(folder / f"rank-{rank}.json")
    return None if beat is None or beat.attempt != attempt else beat


def _read(path: Path) -> Beat | None:
    try:
        data: dict[str, Any] = json.loads(path.read_bytes())
        groups = {name: (str(last), int(count)) for name, (last, count) in data["groups"].items()}
        return Beat(**{**data, "groups": groups})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def clear_beats(folder: Path) -> None:
    """Remove the beats of an earlier attempt."""
    for path in folder.glob("rank-*.json"):
        path.unlink(missing_ok=True)


def gone(before: Iterable[Beat], now: Sequence[Beat]) -> list[Beat]:
    """The ranks to blame: those that ended with an error, else those that gave no further sign."""
    failed = [beat for beat in now if beat.failed]
    numbers = {beat.rank: beat.number for beat in before}
    silent = [b for b in now if b.ended is None and b.number == numbers.get(b.rank)]
    return failed or silent


def last_words(beats: Sequence[Beat]) -> str | None:
    """What became of the ranks of an attempt that is over; none where nothing went wrong."""
    if not beats or all(beat.ended in (DONE, STOPPED) for beat in beats):
        return None
    failed = [beat for beat in beats if beat.failed]
    silent = [beat for beat in beats if beat.ended is None]
    if len(silent) == len(beats):
        # Nobody was left to say who was first; one that is long behind the others was.
        newest = max(beats, key=lambda beat: beat.time)
        silent = [b for b in beats if newest.time - b.time > 3 * newest.every]
    if not (blamed := failed or silent):
        step = max(beat.step for beat in beats)
        return f"before this start all {len(beats)} ranks ended without a word at step {step}"
    return f"before this start {'; '.join(beat.fate() for beat in blamed)}"
