"""Pages from folders of HTML files, each also compressed.

A page's address comes from a JSON file the user names, which maps a file's stem to it, else from
the page itself.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moebius.curate.document import Document, Unread
from moebius.curate.read import LIMIT, Reader, Task, split_tasks
from moebius.curate.read.listing import by_ending, find_files, key_of, root_of
from moebius.curate.read.sniff import clean_url, not_html, page_url
from moebius.curate.read.streams import (
    DAMAGED,
    ENDINGS,
    TOO_LARGE,
    TOO_MUCH,
    Damaged,
    TooMuch,
    unpack,
)

PAGES = tuple(page + ending for ending in ENDINGS for page in (".html", ".htm", ".xhtml"))


@dataclass(frozen=True)
class Pages(Reader):
    """HTML files. `urls` names a JSON file of `{stem: {"url": ...}}` or `{stem: url}`."""

    urls: str = ""

    def tasks(self, task_bytes: int) -> tuple[list[Task], list[Unread]]:
        files, unread = find_files(self.path, by_ending(PAGES), ", ".join(PAGES))
        self._addresses()
        return split_tasks(files, task_bytes), unread

    def read(self, task: Task) -> Iterator[Document | Unread]:
        addresses = self._addresses()
        for name in task.files:
            yield self._page(name, addresses)

    def _page(self, name: str, addresses: dict[str, str]) -> Document | Unread:
        key, path = key_of(name), root_of(self.path) / name
        try:
            size = path.stat().st_size
            packed = name.lower().endswith(ENDINGS[1:])
            if size > LIMIT and not packed:
                return Unread(key, TOO_LARGE, size)
            with unpack(path) as stream:
                page = stream.read(LIMIT + 1)
        except OSError:
            return Unread(key, "unreadable file")
        except Damaged:
            return Unread(key, DAMAGED, size)
        except TooMuch:
            return Unread(key, TOO_MUCH, size)
        if len(page) > LIMIT:
            return Unread(key, TOO_MUCH, size)
        if not page.strip():
            return Unread(key, "empty document", len(page))
        # The ending says HTML: text without a tag is passed on, other formats are not.
        reason = not_html(page)
        if reason and reason not in ("not HTML: plain text", "not HTML: JSON"):
            return Unread(key, reason, len(page))
        url = addresses.get(stem_of(key)) or addresses.get(stem_of(Path(key).name))
        return Document(
            key, "", source=self.name, kind=self.kind, raw=page, url=url or page_url(page)
        )

    def _addresses(self) -> dict[str, str]:
        if not self.urls:
            return {}
        try:
            with Path(self.urls).expanduser().open(encoding="utf-8") as stream:
                data = json.load(stream)
        except (OSError, ValueError, RecursionError) as error:
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"urls: cannot read {self.urls!r} as JSON ({said})") from error
        if not isinstance(data, dict):
            raise ValueError(
                f'urls: {self.urls!r} must hold one object, {{"stem": {{"url": ...}}}}'
            )
        values = {
            stem: value.get("url") if isinstance(value, dict) else value
            for stem, value in data.items()
        }
        return {stem: clean_url(url) for stem, url in values.items() if isinstance(url, str)}


def stem_of(name: str) -> str:
    """A file's name without its known endings."""
    lower = name.lower()
    ending = next((ending for ending in sorted(PAGES, key=len)[::-1] if lower.endswith(ending)), "")
    return name[: len(name) - len(ending)]
