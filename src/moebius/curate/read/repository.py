"""The code and prose files of a repository or of any folder of sources, as their authors left them.

Where git is there its list of files is taken (tracked ones, and others that it does not ignore),
else all; what nobody wrote is left out by the rules of `left_out`.
"""

import io
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moebius.curate.document import Document, Kind, Unread
from moebius.curate.read import LIMIT, Reader, Task, split_tasks
from moebius.curate.read.charset import recoded, survey
from moebius.curate.read.left_out import by_folder, by_name, by_text, language_of
from moebius.curate.read.listing import (
    checked,
    examine,
    find_files,
    key_of,
    place_of,
    root_of,
    split,
)
from moebius.curate.read.streams import TOO_LARGE

LOOKED_FOR = "source code and prose such as .py, .c, .js, .md, .rst"
GIT_SECONDS = 120


@dataclass(frozen=True)
class Repository(Reader):
    """Files of code, with the label `code` of their language, and of prose, of kind prose."""

    kind: Kind = "code"

    def tasks(self, task_bytes: int) -> tuple[list[Task], list[Unread]]:
        root = place_of(self.path)
        names = git_names(root) if (root / ".git").exists() else None
        if names is None:
            files, unread = find_files(self.path, by_name, LOOKED_FOR, by_folder)
        else:
            found = split([*_by_folders(root, names)])
            files, unread = checked(self.path, LOOKED_FOR, found)
        return split_tasks(files, task_bytes), unread

    def read(self, task: Task) -> Iterator[Document | Unread]:
        for name in task.files:
            try:
                yield self._file(name)
            except OSError:
                yield Unread(key_of(name), "unreadable file")

    def _file(self, name: str) -> Document | Unread:
        key = key_of(name)
        with (root_of(self.path) / name).open("rb") as stream:
            data = stream.read(LIMIT + 1)
            if len(data) > LIMIT:
                return Unread(key, TOO_LARGE, stream.seek(0, io.SEEK_END))
        charset = survey(io.BytesIO(data))
        if charset.reason:
            return Unread(key, charset.reason, len(data))
        with recoded(io.BytesIO(data), charset) as stream:
            text = stream.read().decode()
        language = language_of(name)
        if not language:
            return Document(key, text, source=self.name, kind="prose")
        if reason := by_text(name, text):
            return Unread(key, reason, len(data))
        labels = {"code": language}
        return Document(key, text, source=self.name, kind=self.kind, labels=labels)


def _by_folders(root: Path, names: list[str]) -> Iterator[tuple[str, int] | Unread]:
    """Each file as in a walk: a folder left out, or hidden, is one entry whatever is in it."""
    left_out: set[str] = set()
    for name in names:
        parts = name.split("/")
        for depth, part in enumerate(parts[:-1], 1):
            folder = "/".join(parts[:depth])
            reason = "hidden file or folder" if part.startswith(".") else by_folder(folder)
            if reason:
                if folder not in left_out:
                    left_out.add(folder)
                    yield Unread(key_of(folder), reason)
                break
        else:
            if (root / name).is_dir() and not (root / name).is_symlink():
                yield Unread(key_of(name), "repository within the repository")
            else:
                yield examine(root, name, by_name)


def git_names(root: Path) -> list[str] | None:
    """The files git would show in a work tree; None where git is not there or does not answer."""
    # A repository's own configuration must not start programs here.
    safe = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
    command = ("git", *safe, "-C", str(root), "ls-files", "-z", "--cached", "--others")
    try:
        done = subprocess.run(
            [*command, "--exclude-standard"],
            capture_output=True,
            check=False,
            timeout=GIT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode:
        return None
    names = done.stdout.decode("utf-8", "surrogateescape").split("\0")
    return sorted({name for name in names if name})
