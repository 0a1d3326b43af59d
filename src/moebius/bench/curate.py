"""`moebius bench curate`: pages a second from WARC to clean documents, beside datatrove.

The same steps on both sides: extraction, Gopher, C4 and FineWeb rules with datatrove's thresholds,
MinHash, masking; language identification is left out, for datatrove would load its model. Each runs
in a process of its own, timed from its start to its written output, children included; a run over
one page says what of that is start-up.
"""

import dataclasses
import gzip
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moebius.bench.command import last_line
from moebius.bench.pages import plain_page, read_pages, varied, write_warcs
from moebius.bench.peers import datatrove_curate
from moebius.bench.timing import machine
from moebius.config import to_json
from moebius.curate.config import Curation
from moebius.curate.read.warc import Warc
from moebius.curate.shards import read_documents
from moebius.curate.step import Step
from moebius.curate.steps.c4 import C4
from moebius.curate.steps.extract import Extract
from moebius.curate.steps.fineweb import FineWeb
from moebius.curate.steps.gopher_quality import GopherQuality
from moebius.curate.steps.gopher_repetition import GopherRepetition
from moebius.curate.steps.mask import Mask
from moebius.curate.steps.minhash import MinHash

EXTRACT, MINHASH = Extract(), MinHash()
# Where our defaults are not datatrove's they are set to those.
STEPS: tuple[Step, ...] = (
    EXTRACT,
    GopherRepetition(),
    GopherQuality(marks_are_words=True),
    C4(endings=(".", "?", "!", '"', "'")),
    FineWeb(max_duplicate_line_characters=0.01),
    MINHASH,
    Mask(what=("email", "ip")),
)
_CHILD = (
    "import json,sys; from pathlib import Path; from moebius.config import from_json;"
    "from moebius.curate.config import Curation; from moebius.curate.pipeline import curate;"
    "curate(from_json(Curation, json.loads(sys.argv[1])), Path(sys.argv[2]))"
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of a process and its children: on the clock, and of processors."""

    wall: float
    cpu: float


@dataclasses.dataclass(frozen=True)
class Curated:
    """What one side did: its cost, that of a single page, and each page's fate by its address."""

    name: str
    cost: Cost
    start: Cost
    kept: frozenset[str]
    reasons: dict[str, str]
    split: dict[str, float]


Run = Callable[[Path, Path], str]


def bench_curate(
    pages: Path,
    *,
    datatrove_python: Path | None = None,
    workers: int = 1,
    repeats_of_corpus: int = 3,
    repeats: int = 1,
) -> dict[str, Any]:
    """Curate a folder of .html(.gz) pages `repeats_of_corpus` times over, each time in other words.

    `datatrove_python` is the Python of an environment with datatrove, its extras and spaCy; without
    it only our own figures are there. Both take turns, `repeats` times; costs are medians.
    """
    if min(workers, repeats_of_corpus, repeats) < 1:
        raise ValueError("workers, repeats_of_corpus and repeats must be at least 1")
    corpus = varied(read_pages(pages), repeats_of_corpus)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        write_warcs(home / "one", [plain_page()], 1)
        write_warcs(home / "all", corpus, workers)
        runs: dict[str, Run] = {"moebius": lambda w, out: _run_ours(w, out, workers)}
        if datatrove_python is not None:
            runs["datatrove"] = lambda w, out: _run_datatrove(w, out, workers, datatrove_python)
        costs: dict[str, tuple[list[Cost], list[Cost]]] = {side: ([], []) for side in runs}
        said: dict[str, str] = {}
        for turn in range(repeats):
            for i, which in enumerate(("one", "all")):
                for side, run in runs.items():
                    out = home / f"{side}-{which}-{turn}"
                    cost, said[side] = _timed(lambda r=run, w=which, o=out: r(home / w, o))
                    costs[side][i].append(cost)
        found = [_ours(home / "moebius-all-0", *costs["moebius"], workers)]
        if "datatrove" in runs:
            title = f"datatrove {said['datatrove']}"
            out = home / "datatrove-all-0"
            found.append(_theirs(title, out, *costs["datatrove"], workers))
    rows = [_row(one, found, len(corpus), workers) for one in found]
    facts = machine(torch.device("cpu"), torch.float32)
    notes = [*_times(found[1:]), *_differences(found)]
    return {**facts, "workers": workers, "rows": rows, "split": found[0].split, "notes": notes}


def _row(one: Curated, found: Sequence[Curated], pages: int, workers: int) -> dict[str, Any]:
    ours = found[0]
    row = {
        "name": one.name,
        "pages": pages,
        "pages_per_second": pages / one.cost.wall,
        "start_seconds": one.start.wall,
        "kept": len(one.kept),
    }
    # Where the start is most of it, the rest is noise.
    if one.cost.wall > 2 * one.start.wall:
        row["pages_per_second_after_start"] = pages / (one.cost.wall - one.start.wall)
    # The processes of a pool are not children that are waited for.
    if workers == 1:
        row["pages_per_cpu_second"] = pages / one.cost.cpu
    if one is ours:
        return row
    row["over_peer"] = one.cost.wall / ours.cost.wall
    if workers == 1:
        row["cpu_over_peer"] = one.cost.cpu / ours.cost.cpu
    # Of what either keeps, the share that both keep.
    row["kept_by_both"] = len(one.kept & ours.kept) / max(len(one.kept | ours.kept), 1)
    return row


def _times(peers: Sequence[Curated]) -> list[str]:
    """Where the time of a peer goes, as it counts it itself."""
    return [
        f"time of {one.name}: "
        + ", ".join(f"{name} {share:.1%}" for name, share in one.split.items() if share > 0.001)
        for one in peers
    ]


def _differences(found: Sequence[Curated]) -> list[str]:
    """Why pages that one side keeps are dropped by the other."""
    notes: list[str] = []
    for one, other in zip(found, reversed(found), strict=True):
        if one is other:
            continue
        alone = one.kept - other.kept
        reasons = Counter(other.reasons.get(url, "not read or not extracted") for url in alone)
        listed = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common())
        notes.append(f"kept by {one.name} alone: {len(alone)}" + (f" ({listed})" if alone else ""))
    return notes


# --- the two sides --------------------------------------------------------------------------------


def _timed(run: Callable[[], str]) -> tuple[Cost, str]:
    """What a process that is run and waited for cost, with its own children, and what it said."""
    before = os.times()
    said = run()
    after = os.times()
    cpu = sum(getattr(after, n) - getattr(before, n) for n in ("children_user", "children_system"))
    return Cost(after.elapsed - before.elapsed, cpu), said


def _median(costs: Sequence[Cost]) -> Cost:
    return Cost(*(statistics.median(getattr(c, n) for c in costs) for n in ("wall", "cpu")))


def _run_ours(warcs: Path, out: Path, workers: int) -> str:
    # A task a file.
    recipe = Curation(
        name="bench",
        sources=(Warc(path=str(warcs), name="warc"),),
        steps=STEPS,
        task_bytes=1 << 16,
        engine="local" if workers == 1 else "pool",
        workers=workers,
    )
    return last_line(
        [sys.executable, "-c", _CHILD, json.dumps(to_json(recipe)), str(out)], "curate"
    )


def _run_datatrove(warcs: Path, out: Path, workers: int, python: Path) -> str:
    options = {name: getattr(MINHASH, name) for name in ("shingle", "bands", "rows", "seed")}
    # On the clock, as ours: no page is lost to a busy machine.
    options |= {"workers": workers, "timeout": 10 * EXTRACT.seconds}
    script = str(datatrove_curate.__file__)
    command = [str(python), "-I", script, str(warcs), str(out), json.dumps(options)]
    return last_line(command, "datatrove")


def _ours(out: Path, starts: Sequence[Cost], costs: Sequence[Cost], workers: int) -> Curated:
    from pyarrow import parquet

    kept = {
        document.url
        for path in sorted((out / "documents").glob("*.parquet"))
        for document in read_documents(path)
    }
    reasons: dict[str, str] = {}
    for path in sorted((out / "dropped").glob("*/*.parquet")):
        for row in parquet.read_table(path, columns=["url", "reason"]).to_pylist():
            reasons[row["url"]] = f"{path.parent.name}: {row['reason']}"
    timing = json.loads((out / "timing.json").read_text())
    whole = timing["seconds"] * workers
    split = {step["name"]: step["seconds"] / whole for step in timing["steps"]}
    split["reading, writing, settling"] = 1 - sum(split.values())
    return Curated("moebius", _median(costs), _median(starts), frozenset(kept), reasons, split)


def _theirs(
    title: str, out: Path, starts: Sequence[Cost], costs: Sequence[Cost], workers: int
) -> Curated:
    kept = {row["metadata"]["url"] for row in _rows(out / "kept")}
    reasons = {
        row["metadata"]["url"]: f"{folder.name}: {row['metadata'].get('filter_reason', 'dropped')}"
        for folder in sorted((out / "dropped").glob("*"))
        for row in _rows(folder)
    }
    seconds: dict[str, float] = {}
    for path in sorted((out / "logs").glob("*/stats.json")):
        for block in json.loads(path.read_text()):
            # A block that took no time says 0 instead.
            spent = block["time_stats"]["total"] if block["time_stats"] else 0.0
            name = f"{path.parent.name}: {block['name'].partition(' - ')[2]}"
            seconds[name] = seconds.get(name, 0.0) + spent
    split = {name: spent / (costs[0].wall * workers) for name, spent in seconds.items()}
    return Curated(title, _median(costs), _median(starts), frozenset(kept), reasons, split)


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl.gz"))
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
