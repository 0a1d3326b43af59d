"""A folder that appears whole or not at all: written aside, then renamed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moebius.checkpoint.files import sync_folder


def check_new(out: Path) -> Path:
    """The absolute path of a folder to be made; ValueError where something is in its place."""
    out = out.absolute()
    if out.is_symlink():
        raise ValueError(f"{out} is a link; name a place of its own, or the folder it leads to")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there already and not an empty folder; choose another place")
    there = next(parent for parent in out.parents if parent.exists())
    if not there.is_dir():
        raise ValueError(f"cannot make the folder {out}: {there} is not a folder")
    return out


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name when the block ends well; else it is gone."""
    aside = out.with_name(f".writing-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        sync_folder(aside)
        aside.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise ValueError(f"cannot write {out} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
