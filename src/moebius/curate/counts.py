"""What every step saw, kept, changed and dropped, by reason and by source; sums in any order."""

from collections.abc import Iterable
from typing import Any

from moebius.curate.document import Document, Dropped, Unread


def _add(into: dict[str, list[int]], name: str, num_bytes: int) -> None:
    entry = into.setdefault(name, [0, 0])
    entry[0] += 1
    entry[1] += num_bytes


class Counts:
    """The counts of one task. `data` is plain JSON; `merge` adds several up. Final."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {"sources": {}, "unread": {}, "steps": {}, "seconds": {}}
        self.data["kept"] = {"by_source": {}, "by_language": {}, "by_kind": {}, "by_group": {}}

    def read(self, source: str, item: Document | Unread) -> None:
        """Count what a reader gave."""
        if isinstance(item, Unread):
            _add(self.data["unread"].setdefault(source, {}), item.reason, item.num_bytes)
        else:
            _add(self.data["sources"], source, item.num_bytes)

    def step(self, step: int, before: Document, after: Document | Dropped, seconds: float) -> None:
        """Count one decision of a step."""
        entry = self.data["steps"].setdefault(str(step), {"changed": 0})
        source, num_bytes = before.source, before.num_bytes
        _add(entry.setdefault("in", {}), source, num_bytes)
        if isinstance(after, Dropped):
            _add(entry.setdefault("dropped", {}), after.reason, num_bytes)
        else:
            same = after.text is before.text
            _add(entry.setdefault("out", {}), source, num_bytes if same else after.num_bytes)
            entry["changed"] += after.text != before.text
        self.spend(step, seconds)

    def spend(self, step: int, seconds: float) -> None:
        """Count time that a step took."""
        spent = self.data["seconds"]
        spent[str(step)] = spent.get(str(step), 0.0) + seconds

    def kept(self, document: Document, group: str) -> None:
        """Count a document of the result."""
        kept, num_bytes = self.data["kept"], document.num_bytes
        _add(kept["by_source"], document.source, num_bytes)
        _add(kept["by_language"], document.language or "unknown", num_bytes)
        _add(kept["by_kind"], document.kind, num_bytes)
        _add(kept["by_group"], group, num_bytes)


def merge(parts: Iterable[Any]) -> Any:
    """The sum of nested dicts and lists of numbers."""
    total: Any = None
    for part in parts:
        total = part if total is None else _plus(total, part)
    return total


def _plus(left: Any, right: Any) -> Any:
    if isinstance(left, dict):
        names = left.keys() | right.keys()
        return {
            name: _plus(left[name], right[name])
            if name in left and name in right
            else left.get(name, right.get(name))
            for name in sorted(names)
        }
    if isinstance(left, list):
        return [_plus(a, b) for a, b in zip(left, right, strict=True)]
    return left + right
