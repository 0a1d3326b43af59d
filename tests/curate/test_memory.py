"""Memory of a curation stays what it is when the corpus grows tenfold.

By hand, with sizes in MB, a folder for what is written and removed again (up to three times the
larger size), and perhaps other steps: `python tests/curate/test_memory.py 500 5000 /tmp/growth`.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SYLLABLES = ["ba", "de", "fi", "go", "lu", "ma", "ne", "pi", "ro", "su", "ta", "ve", "ki", "zu"]
STOP_WORDS = ["the", "be", "to", "of", "and", "that", "have", "with"]
WORDS_PER_LINE = 12
# Pages that are copies of another, word by word or nearly, and that another page shares its URL.
COPIES, NEAR_COPIES, SAME_URL = 0.1, 0.15, 0.05
# How many documents share a line.
SHARED_BY = 20

STEPS = (
    "repair,url_dedup,exact_dedup,minhash,line_dedup,line_repetition,gopher_repetition,"
    "gopher_quality,mask"
)

# The most that the process held at once, in each stage: the high-water mark is set back after it.
CHILD = """
import contextlib, json, re, sys
from pathlib import Path
from moebius.config import from_json
from moebius.curate.config import Curation
from moebius.curate.pipeline import curate

def peak():
    status = Path("/proc/self/status").read_text()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) << 10

peaks = {"imports": peak()}
def progress(stage, done, total):
    peaks[stage] = max(peaks.get(stage, 0), peak())

recipe, out = json.loads(sys.argv[1]), Path(sys.argv[2])
curate(from_json(Curation, recipe), out, progress)
peaks["report"] = peak()
counts = json.loads((out / "counts.json").read_text())
read = counts["sources"]["rows"]
facts = {"documents": read["documents"], "bytes": read["bytes"]}
facts["dropped"] = {step["name"]: step["in"][0] - step["out"][0] for step in counts["steps"]}
print(json.dumps({**facts, "peak": max(peaks.values()), "peaks": peaks}))
"""


@cache
def vocabulary() -> np.ndarray:
    """Words that can be said; the first are the most frequent."""
    draw = np.random.default_rng(0)
    made = ("".join(draw.choice(SYLLABLES, count)) for count in draw.integers(1, 5, 20_000))
    return np.array([*STOP_WORDS, *dict.fromkeys(made)], object)


def _words(draw: np.random.Generator, count: int) -> list[str]:
    words = vocabulary()
    return words[(draw.random(count) ** 3 * len(words)).astype(int)].tolist()


def text_of(number: int, about: int) -> str:
    """Text `number`; its last line is in others, too."""
    draw = np.random.default_rng(number)
    words = _words(draw, int(np.clip(draw.lognormal(5.6, 0.7), 80, 5000)))
    shared = np.random.default_rng([int(draw.integers(about // SHARED_BY + 1)), 1])
    words += _words(shared, WORDS_PER_LINE - len(words) % WORDS_PER_LINE)
    words += _words(shared, WORDS_PER_LINE)
    starts = range(0, len(words), WORDS_PER_LINE)
    return "\n".join(" ".join(words[i : i + WORDS_PER_LINE]) + "." for i in starts)


def document(number: int, about: int) -> dict[str, str]:
    """Document `number` of a corpus of `about` so many."""
    draw = np.random.default_rng([number, 2])
    kind, other = draw.random(), int(draw.integers(number + 1))
    text = text_of(other if kind < COPIES + NEAR_COPIES else number, about)
    if COPIES <= kind < COPIES + NEAR_COPIES:
        text = f"Café number {number}.\n{text}"
    page = other if draw.random() < SAME_URL else number
    return {
        "text": text,
        "url": f"https://site{page % 997}.example/{page}",
        "date": f"20{number % 25:02}-01-01",
    }


def write_corpus(folder: Path, megabytes: int, shard: int) -> None:
    """JSON lines in files of about `shard` MB, `megabytes` in all."""
    folder.mkdir(parents=True)
    about, number = megabytes * 400, 0
    for part in range(max(1, megabytes // shard)):
        written = 0
        with (folder / f"{part:05d}.jsonl").open("w", encoding="utf-8") as stream:
            while written < shard * 10**6:
                row = json.dumps(document(number, about), ensure_ascii=False)
                written += stream.write(row + "\n")
                number += 1


def curated(home: Path, megabytes: int, shard: int, steps: str) -> dict[str, Any]:
    """Make a corpus and curate it in a process of its own; what that held, by stage."""
    source = {"use": "rows", "path": str(home / "rows"), "name": "rows"}
    uses = [{"use": step} for step in steps.split(",")]
    recipe = {"name": "growth", "sources": [source], "steps": uses, "engine": "local"}
    command = [sys.executable, "-c", CHILD, json.dumps(recipe), str(home / "out")]
    try:
        write_corpus(home / "rows", megabytes, shard)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return json.loads(done.stdout)


def both(home: Path, small: int, large: int, steps: str = STEPS) -> Iterator[dict[str, Any]]:
    """The curations of two sizes of corpus, in shards of the same size."""
    shard = max(1, min(50, small // 2))
    for megabytes in (small, large):
        yield curated(home / f"{megabytes}", megabytes, shard, steps)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are set back as Linux does it")
@pytest.mark.parametrize(
    ("small", "large"), [(1, 3), pytest.param(20, 200, marks=pytest.mark.slow)]
)
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, small: int, large: int) -> None:
    pytest.importorskip("pyarrow", reason="the curate extra is not installed")
    pytest.importorskip("rensa", reason="the curate extra is not installed")
    pytest.importorskip("ftfy", reason="the curate extra is not installed")
    first, second = both(tmp_path, small, large)
    assert second["documents"] > 0.8 * large / small * first["documents"]
    for step in ("02-url_dedup", "03-exact_dedup", "04-minhash"):
        assert second["dropped"][step] > 0.02 * second["documents"]
    assert second["peak"] < 1.5 * first["peak"], (first["peaks"], second["peaks"])


def main(small: str, large: str, folder: str, steps: str = STEPS) -> None:
    """Print the peaks of both sizes by stage, their ratio, and what grew by the document."""
    first, second = both(Path(folder), int(small), int(large), steps)
    more = second["documents"] - first["documents"]
    print(f"{'':24} {first['documents']:>10,} {second['documents']:>10,} documents")
    for stage, peak in second["peaks"].items():
        before = first["peaks"].get(stage, 0)
        grown = (peak - before) / more
        print(f"{stage:24} {before >> 20:>10,} {peak >> 20:>10,} MiB {grown:>8.1f} bytes/document")
    print(f"dropped: {second['dropped']}")
    print(f"peak {first['peak'] >> 20} -> {second['peak'] >> 20} MiB, ratio ", end="")
    print(f"{second['peak'] / first['peak']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
