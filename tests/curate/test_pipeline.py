"""The pipeline: what it does equals a direct computation, and its bytes depend on nothing else."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebius.config import from_json, identity, to_json
from moebius.curate.config import Curation
from moebius.curate.pipeline import curate
from moebius.curate.shards import read_documents

pytest.importorskip("pyarrow", reason="the curate extra is not installed")

TOYS = f"{Path(__file__).with_name('toys.py')}:"
STEPS: list[Any] = [{"use": TOYS + "Short"}, {"use": TOYS + "Same"}, {"use": TOYS + "Lonely"}]


def corpus(folder: Path, files: int = 7, lines: int = 40) -> Path:
    """Lines of few words, so that some are equal; some short, some empty, some that fail."""
    folder.mkdir()
    drawn = np.random.default_rng(5)
    for i in range(files):
        rows = [
            " ".join(f"W{word}" for word in drawn.zipf(1.5, drawn.integers(1, 6)).clip(0, 60))
            for _ in range(lines)
        ]
        rows[3], rows[9] = "", "it goes boom here"
        (folder / f"{i}.txt").write_text("\n".join(rows))
    return folder


def recipe(folder: Path, steps: list[Any] | None = None, **more: Any) -> Curation:
    """The toys over a folder, in shards of two files or so."""
    source = {"use": TOYS + "Lines", "path": str(folder), "name": "lines", "kind": "prose"}
    data = {"name": "toy", "sources": [source], "steps": STEPS if steps is None else steps}
    return from_json(Curation, {**data, "task_bytes": 1 << 16, "engine": "local", **more})


def bytes_of(folder: Path) -> dict[str, str]:
    """The hash of every file that may not depend on how the curation was run."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("timing.json", "report.html", "curation.json")
    }


def expected(folder: Path) -> tuple[list[str], Counter[str]]:
    """Texts kept and reasons of the toys, computed directly."""
    reasons: Counter[str] = Counter()
    rows = [row for file in sorted(folder.glob("*")) for row in file.read_text().split("\n")]
    reasons["empty line"] = rows.count("")
    rows = [row for row in rows if row]
    reasons["step failed on the document"] = sum("boom" in row for row in rows)
    rows = [row for row in rows if "boom" not in row]
    long = [row.lower() for row in rows if len(row.split()) >= 3]
    reasons["too short"] = len(rows) - len(long)
    unique = list(dict.fromkeys(long))
    reasons["seen before"] = len(long) - len(unique)
    count = Counter(word for row in unique for word in row.split())
    kept = [row for row in unique if all(count[word] > 1 for word in row.split())]
    reasons["a lonely word"] = len(unique) - len(kept)
    return kept, reasons


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus, and its curation in this process."""
    home = tmp_path_factory.mktemp("curate")
    texts = corpus(home / "texts")
    return texts, curate(recipe(texts), home / "out")


def test_the_result_is_that_of_a_direct_computation(made: tuple[Path, Path]) -> None:
    texts, out = made
    kept, reasons = expected(texts)
    assert min(reasons.values()) > 0 and len(kept) > 20
    documents = [d for p in sorted((out / "documents").glob("*")) for d in read_documents(p)]
    assert [document.text for document in documents] == kept
    assert all(d.lineage == ("short",) and d.source == "lines" for d in documents)
    counts = json.loads((out / "counts.json").read_text())
    dropped = {k: n for step in counts["steps"] for k, (n, _) in step["dropped"].items()}
    unread = {k: n for k, (n, _) in counts["unread"]["lines"].items()}
    assert dropped | unread == dict(reasons)
    assert counts["kept"]["documents"] == len(kept)
    assert counts["kept"]["bytes"] == sum(len(text) for text in kept)


def test_dropped_documents_are_kept_aside_with_their_reasons(made: tuple[Path, Path]) -> None:
    from pyarrow import parquet

    texts, out = made
    _, reasons = expected(texts)
    found: Counter[str] = Counter()
    for path in (out / "dropped").rglob("*.parquet"):
        found.update(parquet.read_table(path).column("reason").to_pylist())
    assert found == Counter({k: n for k, n in reasons.items() if k != "empty line"})
    assert not (out / "work").exists()


def test_counts_add_up_from_step_to_step(made: tuple[Path, Path]) -> None:
    counts = json.loads((made[1] / "counts.json").read_text())
    flow = counts["sources"]["lines"]["documents"]
    for step in counts["steps"]:
        assert step["in"][0] == flow
        flow = step["out"][0]
        assert step["in"][0] - flow == sum(n for n, _ in step["dropped"].values())
    assert flow == counts["kept"]["documents"]


def test_shards_decide_nothing(made: tuple[Path, Path], tmp_path: Path) -> None:
    texts, out = made
    # One file holds everything: a single shard.
    (tmp_path / "texts").mkdir()
    joined = "\n".join(path.read_text() for path in sorted(texts.glob("*")))
    (tmp_path / "texts" / "all.txt").write_text(joined)
    other = curate(recipe(tmp_path / "texts"), tmp_path / "out")
    left, right = (
        [d.text for p in sorted((o / "documents").glob("*")) for d in read_documents(p)]
        for o in (out, other)
    )
    assert left == right


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A corpus of several shards, and the bytes of its curation in this process."""
    home = tmp_path_factory.mktemp("big")
    texts = corpus(home / "texts", files=6, lines=6000)
    out = curate(recipe(texts), home / "out")
    assert len(json.loads((out / "tasks.json").read_text())) >= 4
    return texts, bytes_of(out)


def test_a_pool_gives_the_same_bytes(big: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    out = curate(recipe(big[0], engine="pool", workers=2), tmp_path / "out")
    assert bytes_of(out) == big[1]


def test_a_ray_cluster_gives_the_same_bytes(
    big: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="the ray extra is not installed")
    # A process of its own: Ray leaves threads and handlers behind.
    place = tmp_path / "recipe.json"
    place.write_text(json.dumps(to_json(recipe(big[0], engine="ray", workers=2))))
    run = run_apart(place, tmp_path / "out")
    _, said = run.communicate(timeout=300)
    assert run.returncode == 0, said.decode()
    assert bytes_of(tmp_path / "out") == big[1]


def run_apart(recipe_file: Path, out: Path) -> "subprocess.Popen[bytes]":
    """A curation in a process group of its own."""
    code = (
        "import json,sys; from pathlib import Path; from moebius.config import from_json;"
        "from moebius.curate.config import Curation; from moebius.curate.pipeline import curate;"
        "data = json.loads(Path(sys.argv[1]).read_text());"
        "curate(from_json(Curation, data), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(recipe_file), str(out)]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)


def test_a_killed_worker_changes_nothing(
    made: tuple[Path, Path], big: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """The step ends its own worker with SIGKILL on the first document that names `w7`."""
    mark = tmp_path / "killed"
    killer = {"use": TOYS + "Killing", "once": str(mark)}
    texts = tmp_path / "texts"
    texts.mkdir()
    for path in big[0].glob("*"):
        (texts / path.name).write_text(path.read_text().replace("W7 ", "Wkill "))
    steps = [*STEPS[:1], killer, *STEPS[1:]]
    out = curate(recipe(texts, steps, engine="pool", workers=2), tmp_path / "out")
    assert mark.exists()
    again = curate(recipe(texts, steps), tmp_path / "again")
    assert bytes_of(out) == bytes_of(again)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    big: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    out, place = tmp_path / "out", tmp_path / "recipe.json"
    place.write_text(json.dumps(to_json(recipe(big[0], engine="pool", workers=1))))
    stages = ("work/pass-00/shard-00001", "work/pass-01/shard-00000", "work/step-03")
    for stage in stages:
        run = run_apart(place, out)
        while run.poll() is None and not (out / stage).exists():
            try:
                run.wait(0.01)
            except subprocess.TimeoutExpired:
                continue
        assert run.returncode is None, "the run ended before it could be killed"
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("done.json")}
    assert before
    curate(recipe(big[0], engine="local"), out)
    assert bytes_of(out) == big[1]


def test_a_finished_curation_is_left_as_it_is(made: tuple[Path, Path]) -> None:
    texts, out = made
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    curate(recipe(texts), out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_another_recipe_or_input_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    texts, out = made
    with pytest.raises(ValueError, match=r"holds another curation \(steps.0.words"):
        curate(recipe(texts, [{"use": TOYS + "Short", "words": 4}, *STEPS[1:]]), out)
    other = corpus(tmp_path / "texts", files=2)
    out = curate(recipe(other, STEPS[:1]), tmp_path / "out")
    (other / "more.txt").write_text("one more file")
    with pytest.raises(ValueError, match="input files changed"):
        curate(recipe(other, STEPS[:1]), out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(ValueError, match="not empty"):
        curate(recipe(texts), tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_source_with_nothing_to_read_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.txt file"):
        curate(recipe(tmp_path / "empty"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_step_at_all_keeps_everything(tmp_path: Path) -> None:
    texts = corpus(tmp_path / "texts", files=1)
    out = curate(recipe(texts, []), tmp_path / "out")
    counts = json.loads((out / "counts.json").read_text())
    assert counts["kept"]["documents"] == counts["sources"]["lines"]["documents"] == 39


def test_run_time_fields_identify_nothing(made: tuple[Path, Path]) -> None:
    assert identity(recipe(made[0])) == identity(recipe(made[0], engine="pool", workers=3))
