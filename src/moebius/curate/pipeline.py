"""Runs a curation: lists the input, drives the passes and rounds, gathers the result.

The folder holds `curation.json` (the recipe), `tasks.json` (the input as listed), `work/` while it
runs, and at the end `documents/`, `dropped/`, `counts.json`, `timing.json` and `report.html`. What
is finished is never done again: the same command goes on after a kill.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moebius.config import differences, flatten, from_json, identity, to_json
from moebius.curate.config import Curation
from moebius.curate.counts import merge
from moebius.curate.document import Unread
from moebius.curate.engines import Engine
from moebius.curate.engines.local import Local
from moebius.curate.engines.pool import Pool
from moebius.curate.engines.ray import Ray
from moebius.curate.mix import Mix
from moebius.curate.plan import Pass, Place, passes_of, step_name
from moebius.curate.records import ranges_of
from moebius.curate.report import write_report
from moebius.curate.work import (
    RangeWork,
    ShardWork,
    UnionWork,
    do_range,
    do_round_shard,
    do_shard,
    do_union,
    read_counts,
    runs_of,
)
from moebius.data.shards import write_aside

Progress = Callable[[str, int, int], None]


def curate(curation: Curation, folder: Path, progress: Progress | None = None) -> Path:
    """Run a curation into a folder, or go on with it there; returns the folder.

    Raises ValueError where a source has nothing to read, a step lacks its files, or the folder
    holds another curation; nothing is written then.
    """
    found = _list_input(curation)
    for step in curation.steps:
        step.build()
    folder = folder.resolve()
    place = _open(curation, folder, found)
    if (folder / "counts.json").exists():
        _finish(place)
        return folder
    start = time.monotonic()
    engine = _engine(curation)
    try:
        run = _Run(place, curation, engine, progress or (lambda stage, done, total: None))
        run.all_passes()
    finally:
        engine.close()
    _gather(place, curation, found, time.monotonic() - start)
    return folder


def mix_of(folder: Path) -> Mix:
    """The mix of a finished curation; ValueError where it is not finished or has none."""
    if not (folder / "counts.json").exists():
        raise ValueError(f"{folder} holds no finished curation")
    recipe = json.loads((folder / "curation.json").read_text())
    if recipe["mix"] is None:
        raise ValueError(
            f"the curation in {folder} has no mix; train on data.path={folder / 'documents'}"
        )
    return from_json(Mix, recipe["mix"])


def _list_input(curation: Curation) -> tuple[list[Any], dict[str, list[Unread]]]:
    """Every shard as JSON ([source, files, bytes]), and what the listing passed over."""
    listed: list[Any] = []
    passed: dict[str, list[Unread]] = {}
    for i, source in enumerate(curation.sources):
        tasks, unread = source.tasks(curation.task_bytes)
        listed += [[i, list(task.files), task.num_bytes] for task in tasks]
        passed[source.name] = unread
    return listed, passed


def _open(curation: Curation, folder: Path, found: tuple[list[Any], Any]) -> Place:
    """The folder, new or of the same curation over the same input."""
    recipe = {**identity(curation), "files": _named_files(curation)}
    listed = found[0]
    noted, tasks = folder / "curation.json", folder / "tasks.json"
    if noted.exists():
        changed = differences(json.loads(noted.read_text()), json.loads(json.dumps(recipe)))
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ValueError(
                f"{folder} holds another curation ({changed[0]}{more}); give a new --out"
            )
        if json.loads(tasks.read_text()) != listed:
            raise ValueError(f"the input files changed since {folder} was begun; give a new --out")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no curation; give a new --out")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(tasks, json.dumps(listed).encode())
        write_aside(noted, json.dumps(recipe, indent=1).encode())
    return Place(folder, json.dumps(to_json(curation)))


def _named_files(curation: Curation) -> dict[str, str]:
    """The sha256 of every file that a step names (lists, models, a user's own class)."""
    found: dict[str, str] = {}
    for text in flatten(identity(curation.steps)).values():
        if not isinstance(text, str) or not text:
            continue
        path = Path(text.partition(".py:")[0] + ".py" if ".py:" in text else text)
        with contextlib.suppress(OSError, ValueError):
            if path.is_file():
                with path.open("rb") as stream:
                    found[str(path)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _engine(curation: Curation) -> Engine:
    workers = curation.workers or os.cpu_count() or 1
    if curation.engine == "local":
        return Local()
    return Pool(workers) if curation.engine == "pool" else Ray(workers, curation.address)


class _Run:
    """One execution of a curation: what is not done yet is given to the engine."""

    def __init__(
        self, place: Place, curation: Curation, engine: Engine, progress: Progress
    ) -> None:
        self.place, self.curation, self.engine, self.progress = place, curation, engine, progress
        self.sizes = [task.num_bytes for _, task in place.tasks()]

    def all_passes(self) -> None:
        """Every pass with the rounds of the corpus step after it; a pass frees the one before."""
        passes = passes_of(self.curation)
        # A pass whose successor is whole has given its documents up already.
        begin = max((p.number for p in passes if self._whole(p)), default=0)
        for stage in passes[begin:]:
            shards = [ShardWork(self.place, stage.number, i) for i in range(len(self.sizes))]
            self._shards(f"pass {stage.number + 1} of {len(passes)}", do_shard, shards)
            (self.place.stage(stage.number) / "whole").touch()
            if stage.number:
                for i in range(len(self.sizes)):
                    before = self.place.shard(stage.number - 1, i)
                    (before / "kept.parquet").unlink(missing_ok=True)
                    shutil.rmtree(before / "records", ignore_errors=True)
            if stage.then is not None:
                self._rounds(stage, stage.then)

    def _whole(self, stage: Pass) -> bool:
        return (self.place.stage(stage.number) / "whole").exists()

    def _shards(self, what: str, function: Callable[[Any], Any], items: list[ShardWork]) -> None:
        done, total = 0, sum(self.sizes)
        for item in self.engine.run(function, items):
            done += self.sizes[item.shard]
            self.progress(what, done, total)

    def _rounds(self, stage: Pass, step: int) -> None:
        """The rounds of a corpus step, each over all shards, then over ranges, then united."""
        name = step_name(self.curation, step)
        for number in range(len(self.place.whole(step).rounds)):
            if self.place.verdicts(step, number).exists():
                continue
            if number:
                shards = [
                    ShardWork(self.place, stage.number, i, number) for i in range(len(self.sizes))
                ]
                self._shards(f"{name}, round {number + 1}", do_round_shard, shards)
            ranges = ranges_of(runs_of(self.place, stage, number))
            items = [
                RangeWork(self.place, stage, number, i, *bounds) for i, bounds in enumerate(ranges)
            ]
            for done, _ in enumerate(self.engine.run(do_range, items)):
                self.progress(f"{name}, settling", done + 1, len(items))
            union = UnionWork(self.place, step, number, len(items))
            for _ in self.engine.run(do_union, [union]):
                self.progress(f"{name}, settling", len(items), len(items))


# --- the result -----------------------------------------------------------------------------------


def _gather(place: Place, curation: Curation, found: Any, seconds: float) -> None:
    """Move the shards' files to where they stay, add the counts up, write the report."""
    folder, passes = place.folder, passes_of(curation)
    shards = range(len(found[0]))
    total = merge(read_counts(place))
    for stage in passes:
        for i in shards:
            _move_dropped(place.shard(stage.number, i) / "dropped", folder / "dropped", i)
    for i in shards:
        _move_kept(place.shard(passes[-1].number, i), folder / "documents", i)
    report = _counts(curation, total, found[1])
    timing = {
        "steps": [
            {
                "name": step_name(curation, i),
                "documents": sum(
                    n for n, _ in total["steps"].get(str(i), {}).get("in", {}).values()
                ),
                "seconds": total["seconds"].get(str(i), 0.0),
            }
            for i in range(len(curation.steps))
        ],
        "seconds": seconds,
        "engine": curation.engine,
    }
    write_aside(folder / "timing.json", json.dumps(timing, indent=1).encode())
    write_aside(folder / "counts.json", json.dumps(report, indent=1).encode())
    _finish(place)


def _finish(place: Place) -> None:
    """What may be left to do once the counts are written."""
    if not (place.folder / "report.html").exists():
        write_report(place.folder)
    shutil.rmtree(place.work(), ignore_errors=True)


def _move_dropped(source: Path, target: Path, shard: int) -> None:
    for path in sorted(source.glob("*.parquet")):
        (target / path.stem).mkdir(parents=True, exist_ok=True)
        path.rename(target / path.stem / f"part-{shard:05d}.parquet")


def _move_kept(shard: Path, target: Path, number: int) -> None:
    target.mkdir(exist_ok=True)
    name = f"part-{number:05d}.parquet"
    if (shard / "kept.parquet").exists():
        (shard / "kept.parquet").rename(target / name)
    for path in sorted((shard / "kept").glob("*.parquet")):
        (target / path.stem).mkdir(parents=True, exist_ok=True)
        path.rename(target / path.stem / name)


def _counts(curation: Curation, total: Any, passed: dict[str, list[Unread]]) -> dict[str, Any]:
    """`counts.json`: what came in, what each step did, what is kept. No times: equal every run."""
    unread = {name: dict(total["unread"].get(name, {})) for name in passed}
    for name, items in passed.items():
        for item in items:
            entry = unread[name].setdefault(item.reason, [0, 0])
            unread[name][item.reason] = [entry[0] + 1, entry[1] + item.num_bytes]
    steps = []
    for i in range(len(curation.steps)):
        entry = total["steps"].get(str(i), {})
        ins, outs = entry.get("in", {}), entry.get("out", {})
        names = sorted(ins)
        steps.append(
            {
                "name": step_name(curation, i),
                "in": _sum(ins.values()),
                "out": _sum(outs.values()),
                "changed": entry.get("changed", 0),
                "dropped": dict(sorted(entry.get("dropped", {}).items())),
                "by_source": {
                    name: {"in": ins[name], "out": outs.get(name, [0, 0])} for name in names
                },
            }
        )
    kept = {name: dict(sorted(values.items())) for name, values in total["kept"].items()}
    documents, num_bytes = _sum(kept["by_source"].values())
    return {
        "sources": {
            name: dict(zip(("documents", "bytes"), value, strict=True))
            for name, value in sorted(total["sources"].items())
        },
        "unread": {name: dict(sorted(reasons.items())) for name, reasons in unread.items()},
        "steps": steps,
        "kept": {"documents": documents, "bytes": num_bytes, **kept},
    }


def _sum(pairs: Iterable[list[int]]) -> list[int]:
    rows = list(pairs)
    return [sum(row[0] for row in rows), sum(row[1] for row in rows)]
