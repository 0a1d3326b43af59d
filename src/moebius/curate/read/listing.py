"""Which files a source has: sorted, links to folders not followed, all passed over counted.

Names are paths relative to the source; a name that is not UTF-8 keeps its bytes as Python's
surrogate escapes in tasks, so that it can be opened, and is written out in keys.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path

from moebius.curate.document import Unread

Refuse = Callable[[str], str]


def place_of(path: str) -> Path:
    """Where a source lies. Raises ValueError where it does not."""
    if not path:
        raise ValueError("a source has no path; give it one")
    place = Path(path).expanduser()
    try:
        place.stat()
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"cannot read the source {path!r} ({(said or '?').lower()})") from error
    return place


def root_of(path: str) -> Path:
    """The folder that the names of a source's files start from."""
    place = Path(path).expanduser()
    return place if place.is_dir() else place.parent


def key_of(name: str) -> str:
    """A file's name as a key: valid Unicode always."""
    return name.encode("utf-8", "backslashreplace").decode()


def by_ending(endings: tuple[str, ...]) -> Refuse:
    """Refuse the files of other endings."""
    return lambda name: "" if name.lower().endswith(endings) else "unknown kind of file"


def find_files(
    path: str, refuse: Refuse, looked_for: str, refuse_folder: Refuse = lambda name: ""
) -> tuple[list[tuple[str, int]], list[Unread]]:
    """The files of a source with their sizes, and what was passed over.

    `refuse` gives the reason why a file is not read, or nothing. Raises ValueError where there is
    no such path, or nothing to read in it.
    """
    place = place_of(path)
    mode = place.stat().st_mode
    if stat.S_ISDIR(mode):
        found = walk(place, refuse, refuse_folder)
    else:
        found = split([examine(place.parent, place.name, refuse)])
    return checked(path, looked_for, found)


def checked(
    path: str, looked_for: str, found: tuple[list[tuple[str, int]], list[Unread]]
) -> tuple[list[tuple[str, int]], list[Unread]]:
    """What was found; ValueError where it is nothing."""
    if not found[0]:
        counts: dict[str, int] = {}
        for unread in found[1]:
            counts[unread.reason] = counts.get(unread.reason, 0) + 1
        why = "".join(f"; {reason}: {count}" for reason, count in sorted(counts.items()))
        raise ValueError(f"nothing to read in {path!r}; looked for {looked_for}{why}")
    return found


def split(
    found: list[tuple[str, int] | Unread],
) -> tuple[list[tuple[str, int]], list[Unread]]:
    """Files and what was passed over, each in the order of names."""
    files = [item for item in found if not isinstance(item, Unread)]
    unread = [item for item in found if isinstance(item, Unread)]
    return sorted(files), sorted(unread, key=lambda item: (item.key, item.reason))


def examine(root: Path, name: str, refuse: Refuse) -> tuple[str, int] | Unread:
    """One file by its name: with its size if it is to be read, else why not."""
    key = key_of(name)
    if name.rpartition("/")[2].startswith("."):
        return Unread(key, "hidden file or folder")
    try:
        status = (root / name).stat()
    except (OSError, ValueError):
        return Unread(key, "unreadable file")
    if stat.S_ISDIR(status.st_mode):
        return Unread(key, "link to a folder")
    if not stat.S_ISREG(status.st_mode):
        return Unread(key, "not a regular file")
    reason = refuse(name)
    return Unread(key, reason, status.st_size) if reason else (name, status.st_size)


def walk(
    root: Path, refuse: Refuse, refuse_folder: Refuse = lambda name: ""
) -> tuple[list[tuple[str, int]], list[Unread]]:
    """All files under a folder. A folder passed over is one entry, whatever is in it."""
    found: list[tuple[str, int] | Unread] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(root / folder))
        except OSError:
            found.append(Unread(key_of(folder), "unreadable folder"))
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if not entry.is_dir(follow_symlinks=False):
                found.append(examine(root, name, refuse))
            elif reason := _hidden(entry.name) or refuse_folder(name):
                found.append(Unread(key_of(name), reason))
            else:
                folders.append(name)
    return split(found)


def _hidden(name: str) -> str:
    return "hidden file or folder" if name.startswith(".") else ""
