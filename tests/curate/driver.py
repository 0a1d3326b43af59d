"""Runs a corpus step as its contract says, in memory and in the plainest way.

Documents are cut into shards, each shard's records into spills that are combined, merged and
combined again, all records into ranges of hashes; nothing of that may change a decision. What
steps are given cannot be written to.
"""

import numpy as np

from moebius.curate.document import Document
from moebius.curate.step import CorpusStep, Decision, Round

# Documents whose records are combined at once.
SPILL = 3


def run_step(
    step: CorpusStep, documents: list[Document], shards: int = 1, ranges: int = 1
) -> list[Decision]:
    """The decision on each document, in order."""
    whole = step.build()
    placed = places(len(documents), shards)
    taken = [(place, d) for place, d in zip(placed, documents, strict=True) if step.takes(d)]
    known: np.ndarray | None = None
    for one in whole.rounds:
        known = run_round(one, taken, known, ranges)
    if known is None:
        return list(documents)
    return [
        whole.apply(document, place, known) if step.takes(document) else document
        for place, document in zip(placed, documents, strict=True)
    ]


def places(count: int, shards: int) -> list[int]:
    """The places of documents: the shard in the upper half, the row in the lower."""
    edges = [count * shard // shards for shard in range(shards + 1)]
    return [
        (shard << 32) + row
        for shard in range(shards)
        for row in range(edges[shard + 1] - edges[shard])
    ]


def run_round(
    one: Round, taken: list[tuple[int, Document]], known: np.ndarray | None, ranges: int
) -> np.ndarray | None:
    """The verdicts of one round; None where no document was there to give records."""
    parts: list[np.ndarray] = []
    for shard in sorted({place >> 32 for place, _ in taken}):
        given = [one.records(d, place, known) for place, d in taken if place >> 32 == shard]
        spills = [given[start : start + SPILL] for start in range(0, len(given), SPILL)]
        parts.append(combined(one, [combined(one, spill) for spill in spills]))
    if not parts:
        return None
    records = in_order(np.concatenate(parts))
    edges = [(1 << 64) * index // ranges for index in range(1, ranges)]
    cuts = np.searchsorted(records["hash"], np.array(edges, np.uint64))
    findings: list[np.ndarray] = []
    for part in np.split(records, cuts):
        together = np.concatenate([*findings, one.settle(frozen(part))])
        findings = [frozen(one.condense(frozen(together)))]
    verdicts = one.unite(findings[0])
    first = (verdicts.dtype.names or ("",))[0]
    return frozen(verdicts[np.argsort(verdicts[first], kind="stable")])


def combined(one: Round, records: list[np.ndarray]) -> np.ndarray:
    """Several arrays of records as one, sorted and combined."""
    return frozen(one.combine(frozen(in_order(np.concatenate(records)))))


def in_order(records: np.ndarray) -> np.ndarray:
    """Records sorted by all their fields, the hash first."""
    names = records.dtype.names or ()
    rest = [name for name in names if name != "hash"]
    return np.sort(records, order=["hash", *rest], kind="stable")


def frozen(records: np.ndarray) -> np.ndarray:
    """A read-only copy."""
    copy = records.copy()
    copy.flags.writeable = False
    return copy
