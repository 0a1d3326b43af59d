"""The folder of a run: its name, its lock, and the files in it that must never be half written.

`run.json`, `summary.json`, `metrics.jsonl` (a line a logged step), `events.jsonl`, `checkpoints/`,
and `code/`, the user's own files that the run was built from.
"""

import errno
import fcntl
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from moebius.checkpoint.files import replace_file
from moebius.config import kept_name
from moebius.train.run import TOKENIZER

LOCK, RANKS, CODE, RUN = ".lock", "ranks", "code", "run.json"
# What a run's folder may hold before it has its run.json; each file is first written aside.
EARLY = frozenset({LOCK, RANKS, RUN, TOKENIZER, CODE})
ASIDE = ".writing-"


@final
@dataclass(frozen=True)
class Cut:
    """How many lines `cut_metrics` took out: of later steps, and torn or unreadable ones."""

    later: int
    unreadable: int


@final
@dataclass(frozen=True)
class RunFolder:
    """A run's folder; make one by `create`, `at` or `open`."""

    path: Path

    @classmethod
    def create(cls, root: Path, name: str) -> "RunFolder":
        """A new folder `root/NAME-N` of the next free number; two processes never share one."""
        name = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
        numbered = re.compile(re.escape(name) + r"-(\d+)")
        root = root.absolute()
        try:
            root.mkdir(parents=True, exist_ok=True)
            taken = [numbered.fullmatch(path.name) for path in root.iterdir()]
            number = max((int(match[1]) for match in taken if match), default=0) + 1
            while not _made(root / f"{name}-{number}"):
                number += 1
        except OSError as error:
            raise ValueError(_cannot("make a run folder in", root, error)) from error
        return cls(root / f"{name}-{number}")

    @classmethod
    def at(cls, path: Path, *, half_made: bool = False) -> "RunFolder":
        """A new run's folder at a place the user chose; it may exist if it is empty.

        With `half_made`, it may hold what a start that was killed before run.json has left.
        """
        path = path.absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(_cannot("make the run folder", path, error)) from error
        check_place(path, empty=True, half_made=half_made)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of an earlier run; reading it asks for no right to write."""
        path = path.absolute()
        if not cls(path).begun:
            raise ValueError(f"there is no run in {path} (no run.json); `moebius runs` lists them")
        return cls(path)

    @property
    def metrics(self) -> Path:
        """A JSON line a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """A JSON line whatever happened: starts, alarms, skipped steps."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def ranks(self) -> Path:
        """What each rank of a launch leaves while it lives."""
        return self.path / RANKS

    @property
    def begun(self) -> bool:
        """Whether there is a run in it."""
        return (self.path / RUN).is_file()

    @contextmanager
    def lock(self, wait: float = 0.0) -> Iterator[None]:
        """Keep other processes from training here; the kernel frees it when this one dies.

        One that is dying is waited for, so many seconds at most.
        """
        try:
            held = [os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)]
        except OSError as error:
            raise ValueError(_cannot("write to", self.path, error)) from error
        # A forked child, such as a data worker, would keep the lock of a parent that was killed.
        os.register_at_fork(after_in_child=lambda: _close(held))
        try:
            try:
                _take(held[0], time.monotonic() + wait)
            except BlockingIOError:
                raise ValueError(
                    f"another process is training in {self.path}; wait for it or stop it"
                ) from None
            except OSError as error:
                raise ValueError(_cannot("lock", self.path, error)) from error
            yield
        finally:
            _close(held)

    def cut_metrics(self, step: int) -> Cut:
        """Take the lines of steps after `step`, and torn ones, out of the metrics and the events.

        A line without a step stays. Each file is rewritten whole or left as it was.
        """
        cuts = [self._cut(path, step) for path in (self.metrics, self.events) if path.exists()]
        return Cut(sum(cut.later for cut in cuts), sum(cut.unreadable for cut in cuts))

    def _cut(self, path: Path, step: int) -> Cut:
        later = unreadable = 0

        def kept() -> Iterator[bytes]:
            nonlocal later, unreadable
            with path.open("rb") as file:
                for line in file:
                    found = _step_of(line)
                    if found is None:
                        unreadable += 1
                    elif found > step:
                        later += 1
                    else:
                        yield line.rstrip(b"\n") + b"\n"

        self._replace(path, kept())
        return Cut(later, unreadable)

    def write_json(self, name: str, data: Mapping[str, Any]) -> Path:
        """Write a JSON file whole or leave the old one; NaN and infinities become null."""
        text = json.dumps(_finite(data), indent=2, allow_nan=False)
        self._replace(self.path / name, iter([text.encode(), b"\n"]))
        return self.path / name

    def copy_in(self, source: Path, name: str) -> None:
        """Copy a file of another folder whole, byte by byte, or leave the old one."""
        try:
            data = source.read_bytes()
        except OSError as error:
            raise ValueError(_cannot("read", source, error)) from error
        self._replace(self.path / name, iter([data]))

    def set_aside(self, name: str, step: int) -> None:
        """Give a file that later steps outdate the name of the step it is of; it may be absent."""
        path = self.path / name
        if path.is_file():
            path.replace(path.with_stem(f"{path.stem}-{step:08d}"))

    def read_json(self, name: str) -> Any:
        """The data of a JSON file in this folder."""
        path = self.path / name
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ValueError(f"the run in {self.path} has no {name}") from None
        except OSError as error:
            raise ValueError(_cannot("read", path, error)) from error
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); restore it from a copy") from error

    def keep_user_file(self, path: str | Path) -> str:
        """Copy a user's own Python file to `code/STEM-HASH.py`; the path of the copy.

        A file that already lies in `code/` stays as it is.
        """
        path, code = Path(path).absolute(), self.path / CODE
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(_cannot("read", path, error)) from error
        if path.parent.resolve() == code.resolve():
            return str(path)
        kept = code / kept_name(path.stem, data)
        if not (kept.is_file() and kept.read_bytes() == data):
            try:
                code.mkdir(exist_ok=True)
            except OSError as error:
                raise ValueError(_cannot("write to", self.path, error)) from error
            self._replace(kept, iter([data]))
        return str(kept)

    def _replace(self, path: Path, chunks: Iterator[bytes]) -> None:
        try:
            replace_file(path, chunks)
        except OSError as error:
            raise ValueError(_cannot("write", path, error)) from error


def check_place(path: Path, *, empty: bool, half_made: bool = False) -> None:
    """ValueError where a folder cannot be made or used at `path`; writes nothing.

    With `empty`, a folder that is there may hold nothing but a lock; with `half_made`, also what is
    written before run.json.
    """
    path = path.absolute()
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ValueError(f"cannot make the run folder {path}: {there} is not a folder")
    if not os.access(there, os.R_OK | os.W_OK | os.X_OK):
        raise ValueError(f"{there} cannot be written; choose another --out")
    allowed = EARLY if half_made else {LOCK}
    if (
        empty
        and there == path
        and not all(_is_of(inside.name, allowed) for inside in path.iterdir())
    ):
        raise ValueError(
            f"{path} is not empty; go on with its run by --resume, or choose another --out"
        )


def _is_of(name: str, allowed: AbstractSet[str]) -> bool:
    return name in allowed or name.removeprefix(ASIDE) in allowed - {LOCK}


def _take(descriptor: int, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.2)


def _made(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def _close(held: list[int]) -> None:
    while held:
        os.close(held.pop())


def _step_of(line: bytes) -> float | None:
    """The step of a line, minus infinity if it names none, None if it cannot be read."""
    try:
        data = json.loads(line)
    except ValueError:
        return None
    if not isinstance(data, dict):
        return None
    step = data.get("step", -math.inf)
    return step if isinstance(step, int | float) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _cannot(what: str, path: Path, error: OSError) -> str:
    remedy = (
        "free some space" if error.errno == errno.ENOSPC else "check the path and its permissions"
    )
    return f"cannot {what} {path}: {error.strerror or error}; {remedy}, or choose another --out"
