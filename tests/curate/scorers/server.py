"""A chat endpoint on this machine: answers by a rule, and misbehaves as it is told to."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Chat:
    """What the server does, and what it was asked.

    `troubles` are given one each to the first requests: a status, or a body sent as it is.
    `answer` gives the text of an answer, or a status, for the content of the last message.
    """

    answer: Callable[[str], str | int]
    troubles: list[int | bytes] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""
    # Requests wait until so many are there together (or five seconds are over).
    gather: threading.Barrier | None = None
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, path: str, headers: dict[str, str], body: bytes) -> int | bytes:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            self.paths.append(path)
            self.headers.append(headers)
            self.asked.append(json.loads(body))
            trouble = self.troubles.pop(0) if self.troubles else None
        if self.gather is not None:
            with contextlib.suppress(threading.BrokenBarrierError):
                self.gather.wait(timeout=5)
        if trouble is not None:
            return trouble
        text = self.answer(json.loads(body)["messages"][-1]["content"])
        if isinstance(text, int):
            return text
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()

    def end(self) -> None:
        with self._lock:
            self._now -= 1


@contextlib.contextmanager
def serving(chat: Chat) -> Iterator[Chat]:
    """Serve on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            reply = chat.begin(self.path, dict(self.headers.items()), body)
            status, data = (reply, b"{}") if isinstance(reply, int) else (200, reply)
            self.send_response(status)
            if status in (429, 503):
                self.send_header("Retry-After", "0")
            if 300 <= status < 400:
                self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            chat.end()
            self.wfile.write(data)

        def do_GET(self) -> None:
            chat.paths.append(self.path)
            chat.headers.append(dict(self.headers.items()))
            self.send_error(500)

        def log_message(self, format: str, *args: Any) -> None:
            """Not into the output of the tests."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket.listen(64)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    chat.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
