"""Objects by their names: in an installed module, or in a user's own file.

A user's file is a module under a name that holds a hash of what is in it, so that a changed file is
another module.
"""

import difflib
import hashlib
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest valid one, and all of them if they are few."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    listed = f" (valid: {', '.join(names)})" if len(names) <= 24 else ""
    return hint + listed


def resolve(spec: str) -> Any:
    """The object named by `module:Name` or `path/to/file.py:Name`."""
    place, _, name = spec.partition(":")
    if not name:
        raise ValueError(f"{spec!r} names no object; write module:Name or file.py:Name")
    module = _load_file(Path(place)) if place.endswith(".py") else _import(place)
    if name not in vars(module):
        public = [key for key in vars(module) if not key.startswith("_")]
        raise ValueError(f"{place} has no {name!r}{nearest(name, public)}")
    return vars(module)[name]


def _import(name: str) -> types.ModuleType:
    if not re.fullmatch(r"\w+(\.\w+)*", name):
        raise ValueError(f"{name!r} is neither a module nor a .py file")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"there is no module {name!r} ({error})") from error


def _load_file(path: Path) -> types.ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    source = path.read_bytes()
    digest = hashlib.sha256(source + str(path).encode()).hexdigest()[:12]
    name = f"moebius_user_{path.stem}_{digest}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            # Not by the loader: bytecode kept beside a file may be of the file before an edit, and
            # a run's folder holds nothing but its own.
            exec(compile(source, path, "exec"), module.__dict__)
        except (SyntaxError, ImportError) as error:
            del sys.modules[name]
            raise ValueError(f"{path} cannot be loaded: {error}") from error
        except Exception:
            del sys.modules[name]
            raise
    return sys.modules[name]


def user_file(cls: type) -> Path | None:
    """The file a user's own class was loaded from; None for the classes of installed packages."""
    if not cls.__module__.startswith("moebius_user_"):
        return None
    return Path(str(sys.modules[cls.__module__].__file__))
