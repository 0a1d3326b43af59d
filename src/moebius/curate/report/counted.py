"""What a curation counted, as it stands in `counts.json` and `timing.json`, read with care.

A page is made of whatever is there: what is missing reads as nothing, what is no number as 0.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Amount(NamedTuple):
    """How many documents, and their bytes."""

    documents: int
    bytes: int

    def plus(self, other: "Amount") -> "Amount":
        """Both together."""
        return Amount(self.documents + other.documents, self.bytes + other.bytes)


NOTHING = Amount(0, 0)
# Steps are counted as `03-minhash`.
_NUMBER = re.compile(r"^\d+-")
Amounts = Mapping[str, Amount]


@dataclass(frozen=True)
class StepCounts:
    """What a step saw, kept, changed and dropped; documents that it passes by are in none of it.

    `seconds` are of all workers together, none where the step was not timed.
    """

    index: int
    name: str
    before: Amount
    after: Amount
    changed: int
    dropped: Amounts
    source_before: Amounts
    source_after: Amounts
    seconds: float | None = None

    @property
    def dropped_all(self) -> Amount:
        """All reasons together."""
        return total(self.dropped.values())

    @property
    def label(self) -> str:
        """Number and name, as a reader counts."""
        return f"{self.index + 1}. {self.name}"

    def leaves(self, present: Amounts) -> dict[str, Amount]:
        """What is there after the step by source, with the documents that it passed by."""
        if not self.source_before:
            present = {"": total(present.values())}
            return {"": _past(present[""], self.before).plus(self.after)}
        return {
            name: _past(amount, self.source_before.get(name, NOTHING)).plus(
                self.source_after.get(name, NOTHING)
            )
            for name, amount in {**dict.fromkeys(self.source_before, NOTHING), **present}.items()
        }


@dataclass(frozen=True)
class Counted:
    """A whole curation in numbers."""

    name: str
    engine: str
    seconds: float | None
    sources: Amounts
    unread: Mapping[str, Amounts]
    steps: tuple[StepCounts, ...]
    kept: Amount
    # source, language, kind, group -> name -> amount
    kept_by: Mapping[str, Amounts]

    @property
    def read(self) -> Amount:
        """All documents that readers gave."""
        return total(self.sources.values())


def _past(present: Amount, seen: Amount) -> Amount:
    """What a step passed by: all that is there but what it saw."""
    documents = max(0, present.documents - seen.documents)
    return Amount(documents, max(0, present.bytes - seen.bytes)) if documents else NOTHING


def total(amounts: Iterable[Amount]) -> Amount:
    """The sum of amounts."""
    found = list(amounts)
    return Amount(sum(a.documents for a in found), sum(a.bytes for a in found))


def read_counted(folder: Path) -> Counted:
    """The counts of a curation's folder; ValueError where there are none."""
    path = folder / "counts.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no finished curation: {path.name} cannot be read") from error
    timing, recipe = _optional(folder / "timing.json"), _optional(folder / "curation.json")
    seconds = [_number(_table(step).get("seconds")) for step in _list(timing.get("steps"))]
    steps = []
    for i, step in enumerate(map(_table, _list(_table(data).get("steps")))):
        by_source = {name: _table(v) for name, v in _table(step.get("by_source")).items()}
        steps.append(
            StepCounts(
                i,
                _NUMBER.sub("", str(step.get("name") or "step")),
                _amount(step.get("in")),
                _amount(step.get("out")),
                int(_number(step.get("changed")) or 0),
                _amounts(step.get("dropped")),
                {name: _amount(both.get("in")) for name, both in by_source.items()},
                {name: _amount(both.get("out")) for name, both in by_source.items()},
                seconds[i] if i < len(seconds) else None,
            )
        )
    kept = _table(_table(data).get("kept"))
    unread = _table(_table(data).get("unread"))
    return Counted(
        str(recipe.get("name") or folder.resolve().name),
        str(timing.get("engine") or ""),
        _number(timing.get("seconds")),
        _amounts(_table(data).get("sources")),
        {name: _amounts(reasons) for name, reasons in unread.items() if reasons},
        tuple(steps),
        _amount(kept),
        {
            name: _amounts(kept.get(f"by_{name}"))
            for name in ("source", "language", "kind", "group")
        },
    )


def _optional(path: Path) -> dict[str, Any]:
    try:
        return _table(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _table(data: Any) -> dict[str, Any]:
    return data if isinstance(data, dict) else {}


def _list(data: Any) -> list[Any]:
    return data if isinstance(data, list) else []


def _number(data: Any) -> float | None:
    if isinstance(data, bool) or not isinstance(data, int | float) or not math.isfinite(data):
        return None
    return max(0.0, data)


def _amount(data: Any) -> Amount:
    """Of `[documents, bytes]` or of an object with these names."""
    if isinstance(data, dict):
        data = [data.get("documents"), data.get("bytes")]
    pair = [int(_number(item) or 0) for item in _list(data)[:2]]
    return Amount(*pair, *[0] * (2 - len(pair)))


def _amounts(data: Any) -> dict[str, Amount]:
    return {str(name): _amount(value) for name, value in _table(data).items()}
