"""Reading run folders: `run.json`, `metrics.jsonl`, `summary.json`, `tokens.json`, `events.jsonl`.

A run that was killed may leave a torn last line; it is left out, and said so. Damage anywhere else
is a ValueError that names the file and the line.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebius.monitor.text import number

_TAIL_BYTES = 4 << 20


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says about its run, finished or not."""

    folder: Path
    info: dict[str, Any]
    lines: list[dict[str, Any]]
    events: list[dict[str, Any]]
    summary: dict[str, Any] | None
    tokens: dict[str, Any] | None
    torn: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.info.get("name") or self.folder.name)

    @property
    def steps(self) -> int | None:
        """The horizon of the recipe's schedule, where it names one."""
        recipe = self.info.get("run")
        horizon = number(recipe, "steps") if isinstance(recipe, Mapping) else None
        return None if horizon is None else int(horizon)


def open_run(folder: Path) -> RunRecord:
    """Read a whole run folder; ValueError where `folder` is not one or a file is damaged."""
    _require_run(folder)
    lines, torn = _parse(folder / "metrics.jsonl")
    events, torn_events = _parse(folder / "events.jsonl")
    names = [name for name, is_torn in (("metrics", torn), ("events", torn_events)) if is_torn]
    return RunRecord(
        folder=folder,
        info=read_json(folder / "run.json"),
        lines=lines,
        events=events,
        summary=_optional(folder / "summary.json"),
        tokens=_optional(folder / "tokens.json"),
        torn=tuple(f"{name}.jsonl" for name in names),
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without a torn last one; none where there is no file yet."""
    return _parse(path)[0]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError where it is missing or damaged."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object")
    return data


def list_runs(root: Path) -> list[dict[str, Any]]:
    """One row for every run folder directly under `root`, by name."""
    if not root.is_dir():
        return []
    return [_row(folder) for folder in sorted(root.iterdir()) if (folder / "run.json").is_file()]


def _row(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(
        ("name", "steps", "loss", "val_bits_per_byte", "params_total", "params_active_mean")
    )
    row |= {"name": folder.name, "folder": str(folder)}
    try:
        info = read_json(folder / "run.json")
        summary = _optional(folder / "summary.json")
        last = _last_line(folder / "metrics.jsonl")
    except ValueError as error:
        return row | {"state": "damaged", "problem": str(error)}
    found = {**info, **(summary or {})}
    return row | {
        "name": str(info.get("name") or folder.name),
        "steps": number(last, "step"),
        "loss": number(last, "loss"),
        "val_bits_per_byte": number(found, "val_bits_per_byte"),
        "params_total": number(found, "params_total"),
        "params_active_mean": number(found, "params_active_mean"),
        "state": "stopped" if summary is None else "finished",
    }


def _require_run(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"there is no run folder {folder}; `moebius runs` lists the runs")
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} is not a run folder (it has no run.json)")


def _optional(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _parse(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The objects of a JSON-lines file, and whether a torn last line was left out."""
    if not path.is_file():
        return [], False
    texts = path.read_bytes().split(b"\n")
    numbered = [(i, text) for i, text in enumerate(texts, 1) if text.strip()]
    lines: list[dict[str, Any]] = []
    for i, text in numbered:
        line = _object(text)
        if line is not None:
            lines.append(line)
        elif i == numbered[-1][0]:
            return lines, True
        else:
            raise ValueError(f"{path} line {i} is damaged: expected a JSON object")
    return lines, False


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(text)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def _last_line(path: Path) -> dict[str, Any]:
    """The last whole line, read from the file's end so that long runs are listed at once."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        texts = file.read().split(b"\n")
    objects = (_object(text) for text in reversed(texts) if text.strip())
    return next((line for line in objects if line is not None), {})
