"""Dirt at known shares, and what each step of a curation is worth."""

import dataclasses
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moebius.config import from_json
from moebius.curate.config import Curation
from moebius.lab.curation import Ablation, arms_of, curation_experiment, small, table
from moebius.lab.dirt import Dirt, soil
from moebius.lab.interval import interval

from ..running import write_corpus

pytest.importorskip("pyarrow", reason="the curate extra is not installed")

TOYS = f"{Path(__file__).parents[1] / 'curate' / 'toys.py'}:"


def book(path: Path, word: str, paragraphs: int) -> Path:
    """Paragraphs of twenty words, each its own."""
    path.parent.mkdir(exist_ok=True)
    rows = [" ".join(f"{word}{i}x{j % 7}" for j in range(20)) for i in range(paragraphs)]
    path.write_text("\n\n".join(rows))
    return path


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    home = tmp_path_factory.mktemp("dirt")
    clean, foreign = book(home / "a" / "clean.txt", "w", 80), book(home / "b" / "f.txt", "z", 40)
    dirt = Dirt(words=40, near_copies=0.5, edits=0.2)
    return home / "dirty.jsonl", soil(clean.parent, foreign.parent, home / "dirty.jsonl", dirt)


def test_every_kind_of_dirt_has_its_share(dirty: tuple[Path, dict[str, int]]) -> None:
    place, counts = dirty
    assert counts == {"clean": 40, "copy": 16, "near": 20, "gibberish": 12, "foreign": 12}
    rows = [json.loads(line) for line in place.read_text().splitlines()]
    assert Counter(row["id"].rpartition("-")[0] for row in rows) == counts
    texts = {kind: [r["text"] for r in rows if r["id"].startswith(kind)] for kind in counts}
    assert set(texts["copy"]) <= set(texts["clean"])
    assert not set(texts["near"]) & set(texts["copy"])
    assert all(text.startswith("z") for text in texts["foreign"])
    soiled = sum("We use cookies" in text for text in texts["clean"])
    assert 10 <= soiled <= 30


def test_dirt_is_the_same_every_time(dirty: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    home = dirty[0].parent
    soil(home / "a", home / "b", tmp_path / "x.jsonl", Dirt(words=40, near_copies=0.5, edits=0.2))
    assert (tmp_path / "x.jsonl").read_bytes() == dirty[0].read_bytes()


def test_foreign_pages_need_a_text(dirty: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name a text of another language"):
        soil(dirty[0].parent / "a", None, tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ablation, Curation, Path, Any]:
    """Two toy steps, each left out, with a model of a few steps."""
    home = tmp_path_factory.mktemp("ablation")
    texts = write_corpus(home / "texts")
    (texts / "more.txt").write_text("one\nthe same line\nthe same line\n")
    source = {"use": TOYS + "Lines", "path": str(texts), "name": "lines", "kind": "prose"}
    steps = [{"use": TOYS + "Short", "words": 2}, {"use": TOYS + "Same"}]
    data = {"name": "toy", "sources": [source], "steps": steps, "engine": "local"}
    curation = from_json(Curation, data)
    run = dataclasses.replace(
        small(), steps=3, batch=2, sequence_length=32, vocab=300, threads=1, precision="fp32"
    )
    ablation = Ablation(run, {"clean": book(home / "v" / "clean.txt", "w", 4)}, seeds=2)
    said: list[str] = []
    result = curation_experiment(curation, ablation, home / "out", say=said.append)
    assert len(said) == 4
    return ablation, curation, home / "out", result


def test_every_step_is_left_out_once(done: tuple[Ablation, Curation, Path, Any]) -> None:
    _, curation, out, result = done
    assert list(arms_of(curation)) == ["all", "01-Short", "02-Same", "none"]
    assert [row["arm"] for row in result["arms"]] == list(arms_of(curation))
    kept = {row["arm"]: row["documents"] for row in result["arms"]}
    assert kept["none"] >= max(kept["01-Short"], kept["02-Same"]) > kept["all"]
    assert json.loads((out / "ablation.json").read_text()) == result


def test_costs_are_paired_by_seed(done: tuple[Ablation, Curation, Path, Any]) -> None:
    whole, *others = done[3]["arms"]
    assert whole["loses"]["clean"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    for row in others:
        pairs = zip(row["by_seed"]["clean"], whole["by_seed"]["clean"], strict=True)
        assert tuple(row["loses"]["clean"].values()) == interval([a - b for a, b in pairs])


def test_arms_share_a_tokenizer_and_tokens(done: tuple[Ablation, Curation, Path, Any]) -> None:
    _, _, out, result = done
    runs = [json.loads(path.read_text())["run"] for path in out.glob("*/seed-*/run.json")]
    assert len(runs) == 8
    assert {run["steps"] for run in runs} == {3}
    tokenizers = {path.read_bytes() for path in out.glob("*/seed-*/tokenizer.json")}
    assert len(tokenizers) == 1
    assert result["tokens"] == 3 * 2 * 32


def test_what_is_done_is_kept(done: tuple[Ablation, Curation, Path, Any]) -> None:
    ablation, curation, out, result = done
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert before
    again = curation_experiment(curation, ablation, out, say=lambda text: None)
    assert again == result
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == before


def test_the_interval_is_students() -> None:
    mean, low, high = interval([0.1, 0.3, 0.2])
    reach = 4.302653 * statistics.stdev([0.1, 0.3, 0.2]) / 3**0.5
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - reach, 0.2 + reach), rel=1e-5)
    assert interval([0.1]) == (0.1, None, None)


def test_a_step_pays_only_for_certain() -> None:
    def row(arm: str, *losses: float) -> dict[str, Any]:
        return {
            "arm": arm,
            "documents": 1,
            "kinds": {"clean": 1},
            "bits_per_byte": {"v": 1.0},
            "loses": {"v": dict(zip(("mean", "low", "high"), interval(losses), strict=True))},
        }

    rows = [row("all", 0, 0), row("a", 0.1, 0.1001), row("b", 0.1, -0.1), row("c", -0.1, -0.1001)]
    rows.append(row("d", 0, 0))
    shown = table({"arms": rows}).splitlines()[2:]
    ends = [line.strip("| ").rpartition("|")[2].strip() for line in shown[1:]]
    assert ends == ["yes", "undecided", "no: it costs", "the same documents are kept"]
