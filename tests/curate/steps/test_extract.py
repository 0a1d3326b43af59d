"""The step as a pipeline sees it: a child process, and pages that would hold it up or kill it."""

import dataclasses
import gc
import os
import signal
import sys
from pathlib import Path

import pytest

from moebius.config import override
from moebius.curate.document import Document, Dropped
from moebius.curate.step import Decide, Filter
from moebius.curate.steps.extract import Extract
from moebius.curate.steps.extract.worker import FAILED, NO_MEMORY, TOO_LONG, Answer, Failure, Worker

pytest.importorskip("trafilatura", reason="needs the curate extra")

SENTENCE = "This is the text of the page, long enough that nobody takes it for a menu."


def web(raw: bytes, key: str = "page") -> Document:
    return Document(key, "", raw=raw, url="https://a.org/b", scores={"a": 1.0})


def html(text: str = SENTENCE) -> bytes:
    head = '<head><meta name="date" content="2020-02-02"></head>'
    return f"<html>{head}<body><p>{text}</p></body></html>".encode()


@pytest.fixture(scope="module")
def decide() -> Decide:
    return Extract().build()


def text_of(decision: Document | Dropped) -> str:
    assert isinstance(decision, Document), decision
    return decision.text


def test_a_page_becomes_text(decide: Decide) -> None:
    page = web(html())
    assert decide(page) == dataclasses.replace(
        page, text=SENTENCE, raw=b"", date="2020-02-02", lineage=("extract",)
    )
    assert decide(dataclasses.replace(page, date="2001-01-01")) == dataclasses.replace(
        page, text=SENTENCE, raw=b"", date="2001-01-01", lineage=("extract",)
    )


def test_what_is_no_page_passes(decide: Decide) -> None:
    prose = Document("book", "Call me Ishmael.", kind="prose")
    assert decide(prose) is prose
    assert not Extract().takes(prose)


@pytest.mark.parametrize("raw", [b" ", b"<html></html>", b"\0\0\0", b"<script>x</script>"])
def test_no_text(decide: Decide, raw: bytes) -> None:
    assert decide(web(raw)) == Dropped("no text found")


def test_the_charset_of_the_server(decide: Decide) -> None:
    page = dataclasses.replace(web(html("Füße " + SENTENCE)), labels={"charset": "latin-1"})
    raw = page.raw.decode().encode("latin-1")
    assert text_of(decide(dataclasses.replace(page, raw=raw))) == "Füße " + SENTENCE


HOSTILE = {
    "nested": b"<div>" * 100_000 + SENTENCE.encode() + b"</div>" * 100_000,
    "unclosed": b"<font><b>" * 50_000 + SENTENCE.encode(),
    "nul": b"\0<p>\0" + SENTENCE.replace(" ", "\0 ").encode() + b"\0</p>",
    "one line": b"<p>" + SENTENCE.encode() + b"</p><pre>" + b"x" * (16 << 20) + b"</pre>",
    "cut": html(SENTENCE + " And")[:-18],
}


@pytest.mark.parametrize("way", HOSTILE)
def test_hostile_pages_give_their_text(decide: Decide, way: str) -> None:
    assert SENTENCE in text_of(decide(web(HOSTILE[way])))


def test_a_page_that_takes_too_long_is_dropped_and_the_next_one_read() -> None:
    decide = Extract(seconds=0.3).build()
    assert decide(web(b"<p>a" * 300_000)) == Dropped(TOO_LONG)
    assert text_of(decide(web(html()))) == SENTENCE


def test_a_page_that_takes_too_much_memory_is_dropped_and_the_next_one_read() -> None:
    decide = Extract(memory=64 << 20).build()
    assert decide(web(b"<b></b>" * 1_200_000)) == Dropped(NO_MEMORY)
    assert text_of(decide(web(html()))) == SENTENCE


# A child that kills itself once, always, or says nothing, by what the page holds.
CHILD = """
import os, pathlib, signal, struct, sys
flag = pathlib.Path(sys.argv[1])
def send(data):
    os.write(1, struct.pack("<I", len(data)) + data)
def receive():
    head = sys.stdin.buffer.read(4)
    return sys.stdin.buffer.read(struct.unpack("<I", head)[0]) if head else None
send(b"{}")
while receive() is not None:
    page = receive()
    if page == b"always" or (page == b"once" and not flag.exists()):
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if page == b"profile":
        os.kill(os.getpid(), signal.SIGPROF)
    if page == b"wait":
        signal.pause()
    send(b'{"status": "", "text": "%s %d", "date": ""}' % (page, os.getpid()))
"""


def worker(tmp_path: Path, seconds: float = 60.0, pages: int = 100) -> Worker:
    command = (sys.executable, "-c", CHILD, str(tmp_path / "flag"))
    return Worker(command, seconds, pages)


def said(answer: Answer | Failure) -> str:
    assert isinstance(answer, Answer), answer
    return answer.text.split()[0]


def test_a_child_killed_from_outside_costs_nothing(tmp_path: Path) -> None:
    asked = worker(tmp_path)
    assert said(asked.ask(b"a", "")) == "a"
    pid = asked.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert said(asked.ask(b"b", "")) == "b"
    assert asked.pid != pid
    assert said(asked.ask(b"once", "")) == "once"


def test_a_page_that_always_kills_the_child_is_given_up(tmp_path: Path) -> None:
    asked = worker(tmp_path)
    assert asked.ask(b"always", "") == Failure(FAILED, "the process ended with status -9")
    assert said(asked.ask(b"next", "")) == "next"
    assert asked.ask(b"profile", "") == Failure(TOO_LONG)
    assert said(asked.ask(b"next", "")) == "next"


def test_a_child_that_waits_is_killed(tmp_path: Path) -> None:
    asked = worker(tmp_path, seconds=0.5)
    answer = asked.ask(b"wait", "")
    assert isinstance(answer, Failure)
    assert answer.reason == TOO_LONG
    assert said(asked.ask(b"next", "")) == "next"


def test_children_are_replaced(tmp_path: Path) -> None:
    asked = worker(tmp_path, pages=2)
    pids = [asked.ask(b"a", "") for _ in range(5)]
    assert len(set(pids)) == 3


def test_the_child_ends_with_its_worker(tmp_path: Path) -> None:
    asked = worker(tmp_path)
    said(asked.ask(b"a", ""))
    pid = asked.pid
    assert pid is not None
    del asked
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_killed_child_changes_no_other_result() -> None:
    asked = Worker(Extract().command(), 300.0, 1000)
    pages = [html(f"{SENTENCE} It is number {i}.") for i in range(6)]
    undisturbed = [asked.ask(page, "") for page in pages]
    assert [answer.text[-2] for answer in undisturbed if isinstance(answer, Answer)] == [*"012345"]
    assert asked.pid is not None
    for i, page in enumerate(pages):
        if i == 3:
            os.kill(asked.pid, signal.SIGKILL)
        assert asked.ask(page, "") == undisturbed[i]


def test_a_child_that_does_not_start_is_an_error_of_one_line() -> None:
    with pytest.raises(ValueError, match=r"does not start; try: .* -c exit"):
        Worker((sys.executable, "-c", "exit(1)"), 1.0, 1).ask(b"a", "")


@pytest.mark.parametrize(
    ("field", "value"), [("seconds", "0"), ("memory", "1000"), ("pages_per_child", "0")]
)
def test_unfit_fields(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=field):
        override(Extract(), [f"{field}={value}"])


def test_it_is_a_filter_of_the_web() -> None:
    assert isinstance(Extract(), Filter)
    assert Extract().kinds == ("web",)
