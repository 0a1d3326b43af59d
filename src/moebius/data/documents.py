"""Which files make a corpus, which documents are held out, and what was left aside.

A document is known by its key: the POSIX path of its file relative to the corpus, and for rows
`#row` after it. Its origin is the key before an oversize document is split; a tenth is held out, by
the sha256 of the origin (modulo 10 equal 0), so all pieces of one text lie on the same side. A
corpus of one plain file is cut into documents of their own, so that it has a held-out part too.
"""

import hashlib
import importlib.util
import os
import stat
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

PYTHON = "python:"
LIBRARY = "python:stdlib"
HUB = "hf:"
PYTHON_EXCLUDED = frozenset(
    ["test", "tests", "idle_test", "pydoc_data", "site-packages", "__pycache__"]
)
PROSE = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc")
# fmt: off
CODE = (
    ".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".cs",
    ".java", ".kt", ".kts", ".scala", ".go", ".rs", ".zig", ".swift", ".m", ".mm", ".js", ".mjs",
    ".cjs", ".jsx", ".ts", ".tsx", ".vue", ".svelte", ".html", ".htm", ".css", ".scss", ".rb",
    ".php", ".pl", ".pm", ".lua", ".r", ".jl", ".hs", ".ml", ".mli", ".ex", ".exs", ".erl",
    ".clj", ".lisp", ".el", ".scm", ".rkt", ".f", ".f90", ".f95", ".pas", ".d", ".nim", ".dart",
    ".groovy", ".sh", ".bash", ".zsh", ".fish", ".ps1", ".sql", ".proto", ".thrift", ".cmake",
    ".mk", ".v", ".sv", ".vhd", ".asm", ".s", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".xml",
    ".ipynb",
)
# fmt: on
ROWS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SINGLE_PIECE = 16 << 10


@dataclass(frozen=True)
class Document:
    """One text. `origin` is the key of the document it was split from, else its own key."""

    key: str
    text: str
    origin: str


@dataclass
class Tally:
    """What was left aside, by reason (how many, how many bytes), and how many texts were split."""

    skipped: dict[str, list[int]] = field(default_factory=dict)
    split: int = 0

    def skip(self, reason: str, num_bytes: int = 0) -> None:
        entry = self.skipped.setdefault(reason, [0, 0])
        entry[0] += 1
        entry[1] += num_bytes

    def add(self, skipped: dict[str, list[int]], split: int) -> None:
        for reason, (count, num_bytes) in skipped.items():
            entry = self.skipped.setdefault(reason, [0, 0])
            entry[0] += count
            entry[1] += num_bytes
        self.split += split


@dataclass(frozen=True)
class File:
    """A file of a corpus, by its key; size and time identify its content."""

    key: str
    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Corpus:
    """A source's files in reading order. `piece` cuts a lone plain file; `hub` names a dataset."""

    name: str
    place: str
    files: tuple[File, ...]
    passed_over: Tally
    piece: int | None = None
    hub: str = ""

    def identity(self) -> object:
        """What the fingerprint covers: place and listing."""
        listing = [[file.key, file.size, file.mtime_ns] for file in self.files]
        return [self.place, self.hub, self.piece, listing]


@dataclass(frozen=True)
class Split:
    """The rule of who is held out, with the one document moved where chance left a side empty."""

    moved: str | None = None

    def held_out(self, origin: str) -> bool:
        return (digest(origin) % 10 == 0) != (origin == self.moved)


def digest(origin: str) -> int:
    """The sha256 of a document's origin, as a number."""
    return int(hashlib.sha256(origin.encode("utf-8", "surrogateescape")).hexdigest(), 16)


def find_split(origins: Iterable[str], name: str) -> Split:
    """Read until both sides have a document; at the end of a one-sided corpus move one over.

    Raises ValueError where the corpus has no document, or only one.
    """
    lowest = highest = ""
    sides: set[bool] = set()
    for origin in origins:
        sides.add(digest(origin) % 10 == 0)
        if len(sides) == 2:
            return Split()
        if not lowest or digest(origin) < digest(lowest):
            lowest = origin
        if not highest or digest(origin) > digest(highest):
            highest = origin
    if not sides:
        raise ValueError(f"data.path: no usable text in {name}; looked for {LOOKED_FOR}")
    if lowest == highest:
        raise ValueError(f"data.path: only one document in {name}; two are needed, one is held out")
    return Split(highest if True in sides else lowest)


# --- listing --------------------------------------------------------------------------------------

LOOKED_FOR = ".txt, .md, source code, .jsonl (also .gz, .zst) and .parquet with text or content"


def kind_of(name: str) -> str | None:
    """How a file is read: `jsonl`, `parquet`, `plain`, or None where its ending is not known."""
    lower = name.lower()
    if lower.endswith(ROWS):
        return "parquet" if lower.endswith(".parquet") else "jsonl"
    return "plain" if lower.endswith(PROSE + CODE) else None


def open_corpus(path: str) -> Corpus:
    """List a source's files. Raises ValueError where there is nothing to read; reads no text."""
    if path.startswith(PYTHON):
        return _python(path)
    if path.startswith(HUB):
        return _hub(path)
    place = Path(path).expanduser()
    try:
        mode = place.stat().st_mode
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"data.path: cannot read {path!r} ({reason})") from error
    if not stat.S_ISDIR(mode):
        return _single(path, place)
    tally = Tally()
    files = tuple(_walk(place, tally))
    if not files:
        found = "".join(f"; {reason}: {n}" for reason, (n, _) in sorted(tally.skipped.items()))
        raise ValueError(f"data.path: no file to read in {path!r}; looked for {LOOKED_FOR}{found}")
    lone = len(files) == 1 and kind_of(files[0].key) == "plain"
    piece = _piece(files[0].size) if lone else None
    return Corpus(path, str(place.resolve()), files, tally, piece)


def _piece(size: int) -> int:
    """About 16 KiB; less for a small file, so that it still gives several documents."""
    return min(SINGLE_PIECE, max(256, size // 16))


def _single(name: str, path: Path) -> Corpus:
    file = _file(path.name, path)
    if file is None or file.size == 0:
        raise ValueError(f"data.path: {name!r} is {'unreadable' if file is None else 'empty'}")
    rows = kind_of(path.name) in ("jsonl", "parquet")
    piece = None if rows else _piece(file.size)
    return Corpus(name, str(path.resolve()), (file,), Tally(), piece)


def _file(key: str, path: Path) -> File | None:
    """The listing entry of a regular file that can be opened, else None."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
    except OSError:
        return None
    return File(key, path, status.st_size, status.st_mtime_ns)


def _python(name: str) -> Corpus:
    """The .py files of the standard library, or of an installed package, tests left out."""
    root = _package(name)
    files = []
    for folder, names, files_here in os.walk(root):
        names[:] = sorted(set(names) - PYTHON_EXCLUDED)
        paths = [Path(folder, file) for file in sorted(files_here) if file.endswith(".py")]
        files += [_file(path.relative_to(root).as_posix(), path) for path in paths]
    readable = tuple(file for file in files if file is not None)
    if not readable:
        raise ValueError(f"data.path: {name!r} has no Python source in {root}")
    tally = Tally()
    for _ in range(len(files) - len(readable)):
        tally.skip("unreadable file")
    ordered = tuple(sorted(readable, key=lambda file: file.key))
    return Corpus(name, str(root.resolve()), ordered, tally)


def _package(name: str) -> Path:
    """Where the source lies, found without importing it."""
    package = name.removeprefix(PYTHON)
    if name == LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    if not package.isidentifier():
        raise ValueError(f"data.path: {name!r} must be {LIBRARY}, or a package as python:torch")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"data.path: {name!r} is no package installed beside this Python")
    return Path(next(iter(spec.submodule_search_locations)))


def _walk(root: Path, tally: Tally) -> list[File]:
    files = []

    def unreadable(_: OSError) -> None:
        tally.skip("unreadable folder")

    for folder, folders, names in os.walk(root, onerror=unreadable):
        for name in [name for name in folders if _passed_over(Path(folder, name), tally)]:
            folders.remove(name)
        for name in names:
            path = Path(folder, name)
            if name.startswith("."):
                tally.skip("hidden file or folder")
            elif kind_of(name) is None:
                tally.skip("unknown kind of file")
            elif (file := _file(path.relative_to(root).as_posix(), path)) is None:
                tally.skip("unreadable file")
            else:
                files.append(file)
    return sorted(files, key=lambda file: file.key)


def _passed_over(folder: Path, tally: Tally) -> bool:
    if folder.name.startswith("."):
        tally.skip("hidden file or folder")
    elif folder.is_symlink():
        tally.skip("link to a folder")
    return folder.name.startswith(".") or folder.is_symlink()


def _hub(path: str) -> Corpus:
    name = path.removeprefix(HUB)
    place = Path(name).expanduser()
    if place.is_dir():
        every = [p for p in sorted(place.rglob("*")) if p.is_file()]
        listed = [_file(p.relative_to(place).as_posix(), p) for p in every]
        files = tuple(file for file in listed if file is not None)
        if not files:
            raise ValueError(f"data.path: the dataset folder {name!r} is empty")
        return Corpus(path, str(place.resolve()), files, Tally(), hub=str(place.resolve()))
    if name.count("/") != 1 or not all(name.split("/")) or name.startswith((".", "~")):
        raise ValueError(f"data.path: {path!r} is neither hf:OWNER/NAME nor a folder that exists")
    return Corpus(path, path, (), Tally(), hub=name)
