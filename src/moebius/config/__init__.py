"""Configuration: frozen dataclasses, JSON, strict keys and types, dotted overrides.

A config is a tree of frozen dataclasses. A field whose type is a `Variant` takes any class of that
seam: by its name in the seam's lazy table, or by `module:Class`, or by `file.py:Class` for a
user's own. In JSON a variant carries `"use"`, the name of its class. Fields made with `runtime`
only run an experiment; all others identify it. Every error is a ValueError of one line that names
the field.
"""

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from moebius.config.objects import nearest as nearest
from moebius.config.objects import resolve as resolve
from moebius.config.objects import user_file as user_file

T = TypeVar("T")
_USER_CLASS = re.compile(r"^(?P<file>.+\.py):(?P<name>\w+)$")


@dataclasses.dataclass(frozen=True)
class Variant:
    """Base of every choosable config. A seam's base class sets `TABLE`, `name -> module:Class`."""

    TABLE: ClassVar[Mapping[str, str]] = {}
    SEAM: ClassVar[str] = "variant"


def runtime(default: Any) -> Any:
    """A field that runs an experiment without identifying it; free to change at resume."""
    return dataclasses.field(default=default, metadata={"runtime": True})


# --- naming classes -------------------------------------------------------------------------------


def spec_of(cls: type, table: Mapping[str, str]) -> str:
    """The shortest name of a class: its table entry, else `file.py:Class` or `module:Class`."""
    path = user_file(cls)
    if path is not None:
        return f"{path}:{cls.__qualname__}"
    full = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for name, spec in table.items() if spec == full), full)


def variant_class(base: type[Variant], name: str, where: str = "") -> type[Variant]:
    """The class a seam calls `name` (a table entry, `module:Class` or `file.py:Class`)."""
    if ":" not in name and name not in base.TABLE:
        raise ValueError(f"{where}unknown {base.SEAM} {name!r}{nearest(name, base.TABLE)}")
    cls = resolve(base.TABLE.get(name, name))
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"{where}{name!r} is not a {base.SEAM} (a subclass of {base.__name__})")
    return cls


# --- dataclass <-> JSON ---------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """Plain JSON data of a config tree; a variant says its class under `"use"`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {field.name: to_json(getattr(value, field.name)) for field in fields(type(value))}
        if isinstance(value, Variant):
            return {"use": spec_of(type(value), value.TABLE), **own}
        return own
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return value


def fields(cls: type) -> list[dataclasses.Field[Any]]:
    """The fields of a config class that its constructor takes."""
    return [field for field in dataclasses.fields(cls) if field.init]


def from_json(hint: Any, data: Any, where: str = "") -> Any:
    """Build a value of type `hint` from JSON data; strict about keys and types."""
    origin = get_origin(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _dataclass_from_json(hint, data, where)
    if origin is Union or origin is types.UnionType:
        return _union_from_json(hint, data, where)
    if origin is Literal:
        if data not in get_args(hint):
            options = [str(arg) for arg in get_args(hint)]
            raise ValueError(f"{_at(where)}{data!r} is not valid{nearest(str(data), options)}")
        return data
    if origin is tuple:
        return _tuple_from_json(hint, data, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, dict):
            raise ValueError(f"{_at(where)}expected an object, got {data!r}")
        return {key: from_json(get_args(hint)[1], data[key], _dot(where, key)) for key in data}
    return _leaf_from_json(hint, data, where)


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _dot(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _dataclass_from_json(cls: type, data: Any, where: str) -> Any:
    if issubclass(cls, Variant) and isinstance(data, str):
        data = {"use": data}
    if not isinstance(data, dict):
        raise ValueError(f"{_at(where)}expected an object of {cls.__name__}, got {data!r}")
    if issubclass(cls, Variant):
        if "use" not in data:
            raise ValueError(f'{_at(where)}a {cls.SEAM} needs "use", the name of its class')
        name, data = data["use"], {key: item for key, item in data.items() if key != "use"}
        cls = variant_class(cls, name, _at(where))
    hints = type_hints(cls)
    known = {field.name for field in fields(cls)}
    for key in data:
        if key not in known:
            raise ValueError(
                f"{_at(where)}{cls.__name__} has no field {key!r}{nearest(key, known)}"
            )
    values = {key: from_json(hints[key], item, _dot(where, key)) for key, item in data.items()}
    return construct(cls, values, where)


def construct(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Call a config's constructor; what is missing or unfit is a ValueError with its place."""
    missing = [
        field.name
        for field in fields(cls)
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        hint = ""
        if issubclass(cls, Variant):
            hint = f'; write {{"use": "{spec_of(cls, cls.TABLE)}", "{missing[0]}": ...}}'
        raise ValueError(f"{_at(where)}{cls.__name__} needs {', '.join(missing)}{hint}")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{_at(where)}{error}") from error


def type_hints(cls: type) -> dict[str, Any]:
    """The resolved annotations of a config class."""
    return typing.get_type_hints(cls, include_extras=False)


def _union_from_json(hint: Any, data: Any, where: str) -> Any:
    options = get_args(hint)
    if data is None and type(None) in options:
        return None
    errors: list[str] = []
    for option in options:
        if option is type(None):
            continue
        try:
            return from_json(option, data, where)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(errors[0])


def _tuple_from_json(hint: Any, data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list | tuple):
        raise ValueError(f"{_at(where)}expected a list, got {data!r}")
    kinds = get_args(hint)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(data)
    if len(kinds) != len(data):
        raise ValueError(f"{_at(where)}expected {len(kinds)} items, got {len(data)}")
    pairs = zip(kinds, data, strict=True)
    return tuple(from_json(kind, item, _dot(where, i)) for i, (kind, item) in enumerate(pairs))


def _leaf_from_json(hint: Any, data: Any, where: str) -> Any:
    if hint is Any:
        return data
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    fits = isinstance(data, hint) and isinstance(data, bool) == (hint is bool)
    if not fits or (isinstance(data, float) and not math.isfinite(data)):
        raise ValueError(f"{_at(where)}expected {_name(hint)}, got {data!r}")
    return data


def _name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    return names.get(hint, str(hint))


def kept_name(stem: str, data: bytes) -> str:
    """The name of a run's copy of a user's file: its stem and the hash of its bytes."""
    return f"{stem}-{hashlib.sha256(data).hexdigest()[:12]}.py"


def kept_file(path: Path) -> str:
    """The path of such a copy as text; ValueError where its bytes are not those it is named by."""
    if not path.is_file() or kept_name(path.stem[:-13], path.read_bytes()) != path.name:
        raise ValueError(f"{path} is not as the run kept it; restore it, or start a new run")
    return str(path)


def map_user_files(data: Any, change: Callable[[str], str]) -> Any:
    """JSON data with the file of every `file.py:Class` text changed, as when a folder moves."""
    if isinstance(data, dict):
        return {key: map_user_files(item, change) for key, item in data.items()}
    if isinstance(data, list):
        return [map_user_files(item, change) for item in data]
    match = _USER_CLASS.match(data) if isinstance(data, str) else None
    return f"{change(match['file'])}:{match['name']}" if match else data


# --- dotted overrides -----------------------------------------------------------------------------


def override(config: T, assignments: Iterable[str]) -> T:
    """Apply `path.to.field=value` texts in order; `*` in a path means every item of a list."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ValueError(f"{assignment!r} is not an override; write field.name=value")
        config = _assign(type(config), config, path.split("."), text, path)
    return config


def _assign(hint: Any, value: Any, path: list[str], text: str, where: str) -> Any:
    if not path:
        return _parse(hint, value, text, where)
    key, rest = path[0], path[1:]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        known = [field.name for field in fields(cls)]
        if key not in known:
            raise ValueError(f"{where}: {cls.__name__} has no field {key!r}{nearest(key, known)}")
        new = _assign(type_hints(cls)[key], getattr(value, key), rest, text, where)
        kept = {name: getattr(value, name) for name in known}
        return construct(cls, {**kept, key: new}, where)
    if isinstance(value, tuple):
        return _assign_item(hint, value, key, rest, text, where)
    if isinstance(value, Mapping):
        if key not in value:
            raise ValueError(f"{where}: there is no {key!r}{nearest(key, value)}")
        item_hint = _mapping_item(hint)
        return {**value, key: _assign(item_hint, value[key], rest, text, where)}
    raise ValueError(f"{where}: nothing lies under {value!r}")


def _assign_item(hint: Any, value: tuple, key: str, rest: list[str], text: str, where: str) -> Any:
    if key != "*" and not (key.isdigit() and int(key) < len(value)):
        raise ValueError(f"{where}: {key!r} is not an index below {len(value)}, nor *")
    chosen = range(len(value)) if key == "*" else [int(key)]
    kinds = get_args(_without_none(hint))
    items = list(value)
    for i in chosen:
        kind = kinds[0] if kinds[-1] is Ellipsis else kinds[i]
        items[i] = _assign(kind, items[i], rest, text, where)
    return tuple(items)


def _mapping_item(hint: Any) -> Any:
    return get_args(_without_none(hint))[1]


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(arg for arg in get_args(hint) if arg is not type(None))
    return hint


def _parse(hint: Any, current: Any, text: str, where: str) -> Any:
    """A value from the text of the command line: by type, a variant's bare name, else JSON."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    kind = next(option for option in options if option is not type(None))
    if kind is str:
        return text
    if get_origin(kind) is Literal:
        literal = next((arg for arg in get_args(kind) if str(arg) == text), text)
        return from_json(kind, literal, where)
    if kind in (int, float):
        try:
            return from_json(kind, kind(text), where)
        except ValueError:
            raise ValueError(f"{where}: expected {_name(kind)}, got {text!r}") from None
    if isinstance(kind, type) and issubclass(kind, Variant) and not text.startswith("{"):
        same = isinstance(current, Variant) and spec_of(type(current), kind.TABLE) == text
        return current if same else from_json(kind, {"use": text}, where)
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        raise ValueError(f"{where}: expected {_name(kind)}, got {text!r}") from None
    return from_json(hint, data, where)


# --- identity -------------------------------------------------------------------------------------


def identity(config: Any) -> Any:
    """The JSON of a config without its run-time fields: what identifies the experiment."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        kept = [field for field in fields(type(config)) if not field.metadata.get("runtime")]
        own = {field.name: identity(getattr(config, field.name)) for field in kept}
        if isinstance(config, Variant):
            return {"use": spec_of(type(config), config.TABLE), **own}
        return own
    if isinstance(config, Mapping):
        return {str(key): identity(item) for key, item in config.items()}
    if isinstance(config, tuple | list):
        return [identity(item) for item in config]
    return config


def flatten(data: Any, where: str = "") -> dict[str, Any]:
    """JSON data as `dotted.path -> leaf`, for showing where two configs differ."""
    if isinstance(data, dict):
        items: Iterable[tuple[Any, Any]] = data.items()
    elif isinstance(data, list):
        items = enumerate(data)
    else:
        return {where: data}
    return {k: v for key, item in items for k, v in flatten(item, _dot(where, key)).items()}


def differences(old: Any, new: Any) -> list[str]:
    """`path: old -> new` for every leaf in which two JSON trees differ."""
    left, right = flatten(old), flatten(new)
    absent = "(absent)"
    return [
        f"{path}: {left.get(path, absent)!r} -> {right.get(path, absent)!r}"
        for path in sorted(left.keys() | right.keys())
        if left.get(path, absent) != right.get(path, absent)
    ]


def fingerprint(config: Any) -> str:
    """A digest of the fields that identify the experiment."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
