"""Running moebius as a user does: its command line, in this process or in one of its own."""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moebius.cli import main

RECIPES = Path(__file__).with_name("tiny.py")
# For runs of which only the losses matter.
UNJUDGED = f"evaluation={RECIPES}:no_evaluation"
COMMAND = [sys.executable, "-c", "from moebius.cli import main; main()"]


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a refused command says, its prefix left off."""
        lines = self.err.splitlines()
        assert self.code == 2 and len(lines) == 1, (self.code, self.err, self.out)
        assert lines[0].startswith("moebius: "), lines
        return lines[0].removeprefix("moebius: ")

    def data(self) -> Any:
        """What a command printed with `--json`."""
        assert self.code == 0, (self.code, self.err)
        return json.loads(self.out)


@dataclass(frozen=True)
class Place:
    """A folder to work in: commands run there, on a corpus and a cache that tests share."""

    folder: Path
    corpus: Path
    cache: Path

    def fields(self, *more: str) -> list[str]:
        """The overrides of a run here."""
        return [f"data.path={self.corpus}", f"data.cache={self.cache}", *more]

    def cli(self, *arguments: str | Path) -> Outcome:
        """Run `moebius ARGUMENTS` in this process."""
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with _as_a_process(self.folder, [str(argument) for argument in arguments]):
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    main()
            except SystemExit as exit:
                code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        return Outcome(code, out.getvalue(), err.getvalue())

    def train(self, out: str, *fields: str, recipe: str = "tiny") -> Path:
        """Train a recipe of `tiny.py` in this process; the run's folder."""
        name = f"{RECIPES}:{recipe}"
        done = self.cli("train", name, *self.fields(*fields), "--out", out)
        assert done.code == 0, done.err
        return self.folder / out

    def child(
        self, *arguments: str | Path, preparation: Callable[[], object] | None = None
    ) -> subprocess.Popen[str]:
        """Start `moebius ARGUMENTS` as a process of its own, which calls `preparation` first."""
        return subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=preparation,
        )

    def training(self, out: str | Path, *fields: str) -> subprocess.Popen[str]:
        """Start to train `tiny` as a process of its own."""
        return self.child("train", f"{RECIPES}:tiny", *self.fields(*fields), "--out", out)


@contextlib.contextmanager
def _as_a_process(folder: Path, arguments: list[str]) -> Iterator[None]:
    old, threads = sys.argv, torch.get_num_threads()
    sys.argv = ["moebius", *arguments]
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        sys.argv = old
        torch.set_num_threads(threads)


def finished(process: subprocess.Popen[str]) -> Outcome:
    """Wait for a child."""
    out, err = process.communicate(timeout=300)
    return Outcome(process.returncode, out, err)


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's metrics or events."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def losses(run: Path) -> dict[int, str]:
    """`loss_hex` by step; there is exactly one line a step, in order."""
    found = [(line["step"], line["loss_hex"]) for line in lines(run)]
    assert [step for step, _ in found] == sorted({step for step, _ in found})
    return dict(found)


def tree(folder: Path) -> list[str]:
    """Everything under a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


WORDS = "def return while tokens expert élan größe 漢字 0 17 = ( ) : # naïve of the"


def write_corpus(folder: Path, num_documents: int = 40) -> Path:
    """A folder of small texts with words, numbers, indentation and letters of several bytes."""
    words, chance = WORDS.split(), random.Random(0)
    folder.mkdir()
    for i in range(num_documents):
        rows = (
            " " * 4 * chance.randrange(3) + " ".join(chance.choices(words, k=chance.randint(3, 9)))
            for _ in range(chance.randint(4, 30))
        )
        (folder / f"text-{i:03d}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
