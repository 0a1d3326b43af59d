"""The child process that extracts, as its parent sees it: ask, wait, kill, replace.

Messages are a length (4 bytes, little-endian) and so many bytes, over the child's standard input
and output. A child says one message when it is ready. One that dies while it reads a page gets one
more try at it, for it may have been killed from outside; a page that is fatal twice is given up.
"""

import contextlib
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass

_START_SECONDS = 300.0
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Answer:
    """What a page gave."""

    text: str
    date: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a page gave nothing: a fixed reason, and what is known of this case."""

    reason: str
    detail: str = ""


TOO_LONG = "extraction took too long"
FAILED = "extraction failed"
NO_MEMORY = "extraction ran out of memory"


def child_command(seconds: float, memory: int, markdown: bool) -> tuple[str, ...]:
    """The command of the child; `seconds` of processor time a page, `memory` bytes in all."""
    module = "moebius.curate.steps.extract.child"
    return (sys.executable, "-P", "-m", module, repr(seconds), str(memory), str(int(markdown)))


def message(*parts: bytes) -> bytes:
    """Parts as messages, each after its length."""
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


class _Gone(Exception):
    """The child closed its output, or did not answer in time."""


class _Child:
    """One running child. Reading and writing never block for longer than they are told to."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout
        os.set_blocking(self.input.fileno(), False)
        os.set_blocking(self.output.fileno(), False)
        self.pages = 0

    def exchange(self, data: bytes, seconds: float) -> bytes:
        """Send `data`, give the next message. Raises _Gone, TimeoutError."""
        deadline = time.monotonic() + seconds
        unsent, received = memoryview(data), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self.output, selectors.EVENT_READ)
            if data:
                selector.register(self.input, selectors.EVENT_WRITE)
            while True:
                left = deadline - time.monotonic()
                ready = selector.select(max(0.0, left))
                if not ready and left <= 0:
                    raise TimeoutError
                for key, _ in ready:
                    if key.fileobj is self.input:
                        unsent = unsent[self._write(unsent) :]
                        if not unsent:
                            selector.unregister(self.input)
                    else:
                        received += self._read()
                if len(received) >= 4:
                    (length,) = struct.unpack_from("<I", received)
                    if len(received) >= 4 + length:
                        return bytes(received[4 : 4 + length])

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self.input.fileno(), data[:_CHUNK])
        except BrokenPipeError:
            raise _Gone from None

    def _read(self) -> bytes:
        data = os.read(self.output.fileno(), _CHUNK)
        if not data:
            raise _Gone
        return data

    def end(self) -> int:
        """Kill it if it still runs, and give its exit status."""
        with contextlib.suppress(BrokenPipeError):
            self.input.close()
        self.process.kill()
        self.output.close()
        return self.process.wait()


class Worker:
    """Answers pages one after another, with as many children as it takes, one at a time.

    `seconds` is how long one answer may take on the clock. The last child is ended when the worker
    is collected, or when the interpreter exits.
    """

    def __init__(self, command: tuple[str, ...], seconds: float, pages_per_child: int) -> None:
        self._command, self._seconds = command, seconds
        self._pages_per_child = pages_per_child
        self._children: list[_Child] = []
        weakref.finalize(self, _end_all, self._children)

    @property
    def pid(self) -> int | None:
        """The process id of the child, None where none runs yet."""
        return self._children[0].process.pid if self._children else None

    def ask(self, raw: bytes, charset: str) -> Answer | Failure:
        """The text of a page. Raises ValueError where no child can be started at all."""
        data = message(charset.encode(), raw)
        answer = self._try(data)
        has_died = isinstance(answer, Failure) and answer.reason == FAILED and not self._children
        return self._try(data) if has_died else answer

    def _try(self, data: bytes) -> Answer | Failure:
        """One try in a running child."""
        child = self._child()
        try:
            reply = json.loads(child.exchange(data, self._seconds))
        except TimeoutError:
            _end_all(self._children)
            return Failure(TOO_LONG, "it waited")
        except _Gone:
            self._children.clear()
            status = child.end()
            if status == -signal.SIGPROF:
                return Failure(TOO_LONG)
            return Failure(FAILED, f"the process ended with status {status}")
        child.pages += 1
        if child.pages >= self._pages_per_child or reply["status"] == NO_MEMORY:
            _end_all(self._children)
        if reply["status"]:
            return Failure(reply["status"], reply["detail"])
        return Answer(reply["text"], reply["date"])

    def _child(self) -> _Child:
        if not self._children:
            child = _Child(self._command)
            self._children.append(child)
            try:
                child.exchange(b"", _START_SECONDS)
            except (_Gone, TimeoutError):
                _end_all(self._children)
                raise ValueError(
                    f"the process that extracts does not start; try: {' '.join(self._command)}"
                ) from None
        return self._children[0]


def _end_all(children: list[_Child]) -> None:
    while children:
        children.pop().end()
