"""Files that outlast a crash: written, hashed on the way, and forced to the disk.

A rename is only safe once the bytes of the file and the entries of its folder are on the disk, so
both are fsynced here.
"""

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

CHUNK_BYTES = 1 << 24


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a new file and fsync it; its size and the sha256 of what was to be written."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            file.write(chunk)
            del chunk  # its memory must be free before the next is made
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def hash_file(path: Path) -> str:
    """The sha256 of a file as it can be read now, through a small buffer."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def forget_cached(path: Path) -> None:
    """Ask the kernel to read the file from the disk next time, where it can be asked."""
    if sys.platform == "linux":
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (new, renamed, removed names) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file whole or leave it as it was: aside, fsynced, renamed."""
    aside = path.with_name(f".writing-{path.name}")
    try:
        aside.unlink(missing_ok=True)
        write_file(aside, chunks)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)
