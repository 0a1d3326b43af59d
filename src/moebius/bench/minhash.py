"""`moebius bench minhash`: near duplicates found, and documents a second, beside datatrove.

Pieces of books, each with one edited copy; both find near duplicates with the same shingles and
bands, one worker each, and CPU time is counted from texts in memory to decisions. Recall is the
share of copies that hang together with their original; expected is what bands find by theory, from
the true similarity of the pairs; false are documents that hang together with a foreign original.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moebius.bench.command import last_line
from moebius.bench.peers import datatrove_minhash
from moebius.bench.planted import EDITS, Planted, planted
from moebius.bench.timing import machine
from moebius.curate.document import Document, Dropped
from moebius.curate.grams import gram_hashes, word_hashes
from moebius.curate.groups import REPEATS
from moebius.curate.steps.minhash import MinHash


@dataclasses.dataclass(frozen=True)
class Found:
    """A label for each document, equal where they hang together; CPU seconds from first to last."""

    labels: list[int]
    seconds: float


def bench_minhash(
    texts: Path,
    *,
    datatrove_python: Path | None = None,
    step: MinHash | None = None,
    originals: int = 4000,
    words: int = 300,
    seed: int = 0,
    repeats: int = 3,
) -> dict[str, Any]:
    """Find planted near duplicates in the .txt books of a folder; machine facts and `rows`.

    `datatrove_python` is the Python of an environment with datatrove and spaCy; without it only our
    own figures are there. Ours is the median of `repeats`.
    """
    documents = planted(texts, originals, words, seed)
    rows = compare(step or MinHash(), documents, datatrove_python, repeats)
    return {**machine(torch.device("cpu"), torch.float32), "rows": rows}


def compare(
    step: MinHash, documents: Sequence[Planted], datatrove_python: Path | None, repeats: int
) -> list[dict[str, Any]]:
    """A row for each of the two, and one for each kind of edit."""
    runs = [_ours(step, documents) for _ in range(repeats)]
    ours = Found(runs[0].labels, statistics.median(run.seconds for run in runs))
    found = {"moebius": ours}
    if datatrove_python is not None:
        name, peer = _datatrove(step, documents, datatrove_python)
        found[name] = peer
    rows = [_row(name, one, documents, ours) for name, one in found.items()]
    return rows + [_edit_row(step, edit, documents, found) for edit in EDITS]


def _row(name: str, found: Found, documents: Sequence[Planted], ours: Found) -> dict[str, Any]:
    return {
        "name": name,
        "documents_per_second": len(documents) / found.seconds,
        "over_peer": found.seconds / ours.seconds if found is not ours else None,
        "recall": float(np.mean(_caught(found, documents))),
        "false_positives": _false(found, documents),
        "planted": sum(bool(document.edit) for document in documents),
        **({} if found is ours else _gain(_caught(ours, documents), _caught(found, documents))),
    }


def _edit_row(
    step: MinHash, edit: str, documents: Sequence[Planted], found: Mapping[str, Found]
) -> dict[str, Any]:
    """How many copies of one edit are found, by whom, and how many are to be expected."""
    texts = {document.source: document.text for document in documents if not document.edit}
    alike = [similarity(step, d.text, texts[d.source]) for d in documents if d.edit == edit]
    expected = 1 - (1 - np.array(alike) ** step.rows) ** step.bands
    caught = [_caught(one, documents, edit) for one in found.values()]
    return {
        "name": edit,
        "planted": len(alike),
        "similarity": float(np.mean(alike)),
        "expected": float(np.mean(expected)),
        "recall": float(np.mean(caught[0])),
        **({"recall_of_peer": float(np.mean(caught[1])), **_gain(*caught)} if caught[1:] else {}),
    }


def _gain(ours: Sequence[bool], theirs: Sequence[bool]) -> dict[str, float]:
    """How much higher our recall is, pair by pair, and half of its 95% confidence interval."""
    gains = np.array(ours, np.float64) - np.array(theirs, np.float64)
    return {"gain": float(gains.mean()), "interval": float(1.96 * gains.std() / len(gains) ** 0.5)}


def similarity(step: MinHash, one: str, other: str) -> float:
    """The share of shingles that two texts have in common (Jaccard)."""
    sets = [
        np.unique(
            gram_hashes(word_hashes(t, digits_alike=True, split_apostrophes=True), step.shingle)
        )
        for t in (one, other)
    ]
    both = len(np.intersect1d(sets[0], sets[1]))
    return both / max(len(sets[0]) + len(sets[1]) - both, 1)


def _caught(found: Found, documents: Sequence[Planted], edit: str = "") -> list[bool]:
    """For each copy (of one edit) whether it hangs together with its original."""
    labels = zip(documents, found.labels, strict=True)
    of_source = {document.source: label for document, label in labels if not document.edit}
    return [
        label == of_source[document.source]
        for document, label in zip(documents, found.labels, strict=True)
        if document.edit and edit in ("", document.edit)
    ]


def _false(found: Found, documents: Sequence[Planted]) -> int:
    """Documents that hang together with the first of another source."""
    first: dict[int, int] = {}
    pairs = list(zip(documents, found.labels, strict=True))
    for document, label in pairs:
        first.setdefault(label, document.source)
    return sum(first[label] != document.source for document, label in pairs)


def _ours(step: MinHash, documents: Sequence[Planted]) -> Found:
    """The step over documents in memory, as one worker runs it."""
    given = [Document(str(index), one.text) for index, one in enumerate(documents)]
    whole = step.build()
    # Tables are built at first use.
    whole.rounds[0].records(given[0], 0, None)
    start = time.process_time()
    records = [whole.rounds[0].records(one, place, None) for place, one in enumerate(given)]
    merged = np.concatenate(records)
    merged = merged[np.lexsort((merged["place"], merged["hash"]))]
    verdicts = whole.rounds[0].unite(whole.rounds[0].settle(merged))
    decisions = [whole.apply(one, place, verdicts) for place, one in enumerate(given)]
    seconds = time.process_time() - start
    labels = list(range(len(given)))
    for place, kept in verdicts[list(REPEATS.names or ())].tolist():
        labels[place] = kept
    assert sum(isinstance(one, Dropped) for one in decisions) == len(verdicts)
    return Found(labels, seconds)


def _datatrove(step: MinHash, documents: Sequence[Planted], python: Path) -> tuple[str, Found]:
    """datatrove's MinHash of the same shape, in a child process of another Python."""
    options = {name: getattr(step, name) for name in ("shingle", "bands", "rows", "seed")}
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps({"text": document.text}) for document in documents]
        path = Path(folder, "documents.jsonl")
        path.write_text("\n".join(lines), encoding="utf-8")
        script = str(datatrove_minhash.__file__)
        command = [str(python), "-I", script, str(path), folder, json.dumps(options)]
        said = last_line(command, "datatrove")
    result = json.loads(said)
    labels = [own if own >= 0 else -1 - index for index, own in enumerate(result["clusters"])]
    return f"datatrove {result['version']}", Found(labels, result["seconds"]["all"])
