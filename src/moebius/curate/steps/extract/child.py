"""The process that extracts: reads pages from standard input, writes texts to standard output.

Run as `python -m moebius.curate.steps.extract.child SECONDS MEMORY MARKDOWN`; see `worker` for the
messages. Its address space may grow by MEMORY bytes. A page that takes too much processor time
ends the process by the signal of the profiling timer, also within a parser written in C. It ends
with its input.
"""

import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import BinaryIO

from moebius.curate.steps.extract.page import read_page
from moebius.curate.steps.extract.worker import FAILED, NO_MEMORY, message


def serve(pages: BinaryIO, texts: BinaryIO, seconds: float, markdown: bool) -> None:
    """Answer every page of `pages`, until it ends."""
    texts.write(message(b"{}"))
    texts.flush()
    while True:
        charset, raw = _received(pages), _received(pages)
        if charset is None or raw is None:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = json.dumps(_answer(raw, charset.decode(), markdown)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        texts.write(message(reply))
        texts.flush()


def _answer(raw: bytes, charset: str, markdown: bool) -> dict[str, str]:
    try:
        page = read_page(raw, charset, markdown)
    except MemoryError:
        return {"status": NO_MEMORY, "detail": ""}
    # whatever a page does to a parser, the page is counted and the next one read
    except Exception as error:
        return {"status": FAILED, "detail": f"{type(error).__name__}: {error}"[:200]}
    return {"status": "", "text": page.text, "date": page.date}


def _received(pages: BinaryIO) -> bytes | None:
    head = pages.read(4)
    if len(head) < 4:
        return None
    (length,) = struct.unpack("<I", head)
    data = pages.read(length)
    return data if len(data) == length else None


def _address_space() -> int:
    """Bytes mapped so far, most of them never used: libraries reserve by the number of cores."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[0]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


def main(arguments: list[str]) -> None:
    """Bound the process, then serve."""
    seconds, memory, markdown = float(arguments[0]), int(arguments[1]), arguments[2] == "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # nothing that a library prints may get between the messages
    texts = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    read_page(b"<p>What is loaded on first use is loaded before the first page is timed.</p>")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = _address_space() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    serve(sys.stdin.buffer, texts, seconds, markdown)


if __name__ == "__main__":
    main(sys.argv[1:])
