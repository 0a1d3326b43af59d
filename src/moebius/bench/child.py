"""A process of its own for each model that is timed, so that its peak of memory is its own.

The parent asks and the child answers, one JSON object a line: `build` a stepper of a place, `step`
it, tell what was seen `after`, `split` a step. Only one child works at a time. What libraries print
in a child goes to standard error.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Self, TextIO, final

from moebius.bench.stepper import Place, Stepper, place_of, timed_step
from moebius.config import resolve


@final
class Child:
    """The parent's end of a process that holds the stepper `spec` (module:Class)."""

    def __init__(self, spec: str, run_json: Any, options: Any) -> None:
        self._spec = spec
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moebius.bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.facts: dict[str, Any] = self._ask("build", spec, run_json, options)
        except BaseException:
            self.close()
            raise

    def _ask(self, what: str, *arguments: Any) -> Any:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps([what, *arguments]) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise ValueError(
                f"the process of {self._spec} ended with code {process.wait()} at {what!r}; "
                "what it said stands above, -9 means that memory ran out"
            )
        answer = json.loads(line)
        if "refused" in answer:
            raise ValueError(answer["refused"])
        return answer["answer"]

    def step(self) -> dict[str, Any]:
        """One step, timed (see `timed_step`)."""
        return self._ask("step")

    def after(self) -> dict[str, Any]:
        """What the model says of the steps done."""
        return self._ask("after")

    def split(self, steps: int) -> dict[str, float]:
        """The parts of a step as shares of 1."""
        return self._ask("split", steps)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(requests: TextIO, replies: TextIO) -> None:
    """The child's end: answer until nothing more is asked."""
    place: Place | None = None
    stepper: Stepper | None = None
    for line in requests:
        what, *arguments = json.loads(line)
        try:
            if what == "build":
                spec, run_json, options = arguments
                place = place_of(run_json)
                stepper = resolve(spec)(place, options)
            assert place is not None and stepper is not None
            answer = {"answer": _answer(what, arguments, place, stepper)}
        except ValueError as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), file=replies, flush=True)


def _answer(what: str, arguments: list[Any], place: Place, stepper: Stepper) -> Any:
    if what == "build":
        return stepper.facts()
    if what == "step":
        return timed_step(place, stepper)
    if what == "after":
        return stepper.after()
    assert what == "split"
    return stepper.split(place, *arguments)


@contextlib.contextmanager
def _replies() -> Iterator[TextIO]:
    """The pipe to the parent, with standard output turned to standard error from now on."""
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        yield replies


if __name__ == "__main__":
    with _replies() as to_parent, contextlib.suppress(KeyboardInterrupt):
        serve(sys.stdin, to_parent)
