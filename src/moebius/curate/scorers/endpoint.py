"""Asking a chat model over HTTP: `POST base_url/chat/completions`, as OpenAI, vLLM and SGLang do.

Every answer lies in a file named by the hash of what was asked, so interrupted work goes on where
it stopped and the same question gives the same answer. Busy servers and broken connections are
asked again, waiting twice as long each time; a refusal of the key or the address ends the run.
"""

import contextlib
import dataclasses
import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebius.curate.text import hash_of

# No chat answer is longer (bytes), whatever a server sends.
_MOST = 4 << 20
_LONGEST_WAIT = 60.0
# What asking again may mend.
_AGAIN = frozenset([408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529])
# What no question to this address will mend.
_HOPELESS = frozenset([301, 302, 303, 307, 308, 401, 403, 404, 405])


class _Unanswered(Exception):
    """One try failed; `wait` is what the server asked to wait, in seconds."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host; it is an error instead."""

    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any
    ) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class Answer:
    """The text of an answer; None where there is none, and `why`."""

    text: str | None
    why: str = ""


class Endpoint:
    """A chat endpoint, its key and its cache. Threads may share it; processes share the cache."""

    def __init__(
        self,
        base_url: str,
        key: str,
        cache: Path | None,
        *,
        tries: int,
        backoff: float,
        timeout: float,
        most_failures: int,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, not {base_url!r}")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self._key, self._cache = key, cache
        self._tries, self._backoff, self._timeout = tries, backoff, timeout
        self._most_failures = most_failures
        self._failures = 0
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect())

    def ask(self, payload: Mapping[str, Any]) -> Answer:
        """The answer to one payload. Raises ValueError where going on makes no sense."""
        body = json.dumps(payload, sort_keys=True).encode()
        name = hashlib.sha256(body).hexdigest()
        known = self._known(name)
        if known is not None:
            return Answer(known)
        why = ""
        for number in range(self._tries):
            try:
                text = self._try(body)
            except _Unanswered as error:
                why = str(error)
                if number + 1 < self._tries:
                    time.sleep(max(error.wait, self._pause(name, number)))
                continue
            if text is None:
                why = "the server refused the request"
                break
            with self._lock:
                self._failures = 0
            self._keep(name, text)
            return Answer(text)
        self._failed(why)
        return Answer(None, why)

    def _try(self, body: bytes) -> str | None:
        """One request: the answer's text, or None where the server finds fault with this one."""
        request = urllib.request.Request(
            self.url, body, {"Content-Type": "application/json"}, method="POST"
        )
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                return _text_of(self._read(response))
        except urllib.error.HTTPError as error:
            with error:
                code, wait = error.code, _seconds(error.headers.get("Retry-After"))
            if code in _HOPELESS:
                raise ValueError(
                    f"{self.url} answers {code} ({http.client.responses.get(code, 'unknown')}); "
                    "check base_url, model and api_key_variable"
                ) from error
            if code in _AGAIN:
                raise _Unanswered(f"the server answers {code}", wait) from error
            return None
        except (OSError, http.client.HTTPException) as error:
            raise _Unanswered(f"no connection ({error})") from error

    def _read(self, response: Any) -> bytes:
        """The body, however slowly it comes: a deadline for all of it, and a limit."""
        deadline = time.monotonic() + self._timeout
        parts: list[bytes] = []
        size = 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > _MOST or time.monotonic() > deadline:
                raise _Unanswered("the answer is too long or too slow")
        return b"".join(parts)

    def _pause(self, name: str, number: int) -> float:
        """Twice as long each time, spread by the question so that they do not all come at once."""
        spread = 0.5 + hash_of(f"{name}{number}") / 2**65
        return min(_LONGEST_WAIT, self._backoff * 2**number) * spread

    def _failed(self, why: str) -> None:
        with self._lock:
            self._failures += 1
            over = self._failures >= self._most_failures
        if over:
            raise ValueError(
                f"{self.url} failed {self._most_failures} questions in a row ({why}); answers so "
                "far are in the cache, so run again once it works"
            )

    def _known(self, name: str) -> str | None:
        if self._cache is None:
            return None
        try:
            kept = json.loads((self._cache / name[:2] / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None  # torn or absent: asked again
        text = kept.get("text") if isinstance(kept, dict) else None
        return text if isinstance(text, str) else None

    def _keep(self, name: str, text: str) -> None:
        if self._cache is None:
            return
        folder = self._cache / name[:2]
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
        aside.write_text(json.dumps({"text": text}), encoding="utf-8")
        os.replace(aside, folder / f"{name}.json")


def _text_of(body: bytes) -> str:
    """The content of the first choice; what is no chat completion is asked for again."""
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError):
        text = json.loads(body)["choices"][0]["message"]["content"]
        if isinstance(text, str):
            return text
    raise _Unanswered("the answer is not a chat completion")


def _seconds(header: str | None) -> float:
    try:
        return min(_LONGEST_WAIT, max(0.0, float(header or 0)))
    except ValueError:
        return 0.0
