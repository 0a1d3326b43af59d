"""The benchmark of the whole curation: its corpus, its figures, and datatrove where it is there."""

import gzip
import importlib.util
import json
import random
import re
import sys
from pathlib import Path

import pytest

from moebius.bench.curate import Cost, Curated, _differences, _row, _theirs, bench_curate
from moebius.bench.pages import varied

HAS_DATATROVE = importlib.util.find_spec("datatrove") is not None


@pytest.fixture(scope="module")
def needed() -> None:
    for package in ("pyarrow", "rensa", "trafilatura"):
        pytest.importorskip(package, reason="the curate extra is not installed")


def page(text: str) -> str:
    paragraphs = "".join(f"<p>{line}</p>" for line in text.split("\n"))
    return f"<html><body><nav>home</nav><article>{paragraphs}</article></body></html>"


def article(seed: int) -> str:
    """Sentences of made-up words between real stop words."""
    draw = random.Random(seed)

    def word() -> str:
        return "".join(draw.choice("bdfglmnprst") + draw.choice("aeiou") for _ in range(3))

    return "\n".join(
        f"The {word()} of {word()} and {word()} {word()} to be {word()} with that {word()}."
        for _ in range(12)
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three articles, one of them twice, and a page of too few words."""
    folder = tmp_path_factory.mktemp("pages")
    texts = [article(1), article(2), article(1), article(3), "Too short."]
    for number, text in enumerate(texts):
        (folder / f"{number}.html.gz").write_bytes(gzip.compress(page(text).encode()))
    return folder


# What a copy keeps: markup, scripts and comments, entities, words of up to four letters.
KEPT = rb"<(?:script|style).*?</(?:script|style)>|<!--.*?-->|<[^>]*>|&\w+;|\b[A-Za-z]{1,4}\b"


def test_copies_are_the_same_pages_in_other_words() -> None:
    first = (
        "<html><head><title>Letters about rivers</title><style>.rivers {color: green}</style>"
        "<script>var rivers = 'valley';</script></head><!-- about rivers -->"
        '<p class="rivers">about rivers &mdash; in a naïveté of green valleys</p>'
        "<p>about mountains, heather and heather</p></html>"
    ).encode()
    second = b"<p>stone bread water flour towers winter summer</p>"
    found = varied([first, second], 4)
    assert found[:2] == [first, second] and len(set(found)) == 8
    before = re.sub(KEPT, b" ", first).split()
    for copy in found[2::2]:
        assert re.findall(KEPT, copy) == re.findall(KEPT, first)
        after = re.sub(KEPT, b" ", copy).split()
        assert list(map(len, after)) == list(map(len, before))
        assert "naïveté".encode() in copy
        # Equal words stay equal and others differ.
        pairs = set(zip(before, after, strict=True))
        assert len(pairs) == len(set(before)) == len(set(after))


@pytest.mark.usefixtures("needed")
def test_our_side_alone(pages: Path) -> None:
    result = bench_curate(pages, repeats_of_corpus=2)
    (row,) = result["rows"]
    assert row["name"] == "moebius" and row["pages"] == 10 and row["kept"] == 6
    assert "over_peer" not in row and "kept_by_both" not in row
    assert row["pages_per_cpu_second"] > 0 and row["start_seconds"] > 0
    assert sum(result["split"].values()) == pytest.approx(1)
    assert result["split"]["01-extract"] > 0 and result["split"]["06-minhash"] > 0


@pytest.mark.usefixtures("needed")
@pytest.mark.skipif(not HAS_DATATROVE, reason="datatrove is not installed")
def test_both_sides_keep_the_same(pages: Path) -> None:
    result = bench_curate(pages, repeats_of_corpus=2, datatrove_python=Path(sys.executable))
    ours, theirs = result["rows"]
    assert ours["kept"] == theirs["kept"] == 6 and theirs["kept_by_both"] == 1
    assert theirs["over_peer"] > 0 and theirs["name"].startswith("datatrove ")


@pytest.mark.usefixtures("needed")
def test_mistakes_are_said_in_one_line(pages: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no \.html or \.html\.gz file"):
        bench_curate(tmp_path)
    with pytest.raises(ValueError, match="must be at least 1"):
        bench_curate(pages, workers=0)


@pytest.mark.usefixtures("needed")
@pytest.mark.skipif(HAS_DATATROVE, reason="datatrove is installed")
def test_a_python_without_datatrove_is_named(pages: Path) -> None:
    with pytest.raises(ValueError, match=r"datatrove failed under .*No module named 'datatrove'"):
        bench_curate(pages, repeats_of_corpus=1, datatrove_python=Path(sys.executable))


def test_figures_and_differences(tmp_path: Path) -> None:
    def rows(name: str, *found: tuple[str, str]) -> None:
        (tmp_path / name).mkdir(parents=True)
        lines = [
            json.dumps({"text": "", "metadata": {"url": url, "filter_reason": why}})
            for url, why in found
        ]
        (tmp_path / name / "00000.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))

    rows("kept", ("a", ""), ("b", ""))
    rows("dropped/c4", ("c", "too_few_sentences"))
    (tmp_path / "logs" / "filters").mkdir(parents=True)
    blocks = [
        {"name": "X - EXTRAC: Trafilatura", "time_stats": {"total": 3.0}},
        {"name": "X - FILTER: C4", "time_stats": 0},
    ]
    (tmp_path / "logs" / "filters" / "stats.json").write_text(json.dumps(blocks))
    costs = [Cost(6.0, 5.0), Cost(12.0, 6.0), Cost(99.0, 7.0)]
    theirs = _theirs("datatrove", tmp_path, [Cost(2.0, 1.0)], costs, 2)
    assert theirs.cost == Cost(12.0, 6.0) and theirs.kept == {"a", "b"}
    assert theirs.split == {"filters: EXTRAC: Trafilatura": 0.25, "filters: FILTER: C4": 0}
    reasons = {"a": "01-extract: no text found"}
    kept = frozenset(("b", "c", "d", "e"))
    ours = Curated("moebius", Cost(4.0, 3.0), Cost(1.0, 1.0), kept, reasons, {})
    row = _row(theirs, [ours, theirs], 30, 1)
    assert row["over_peer"] == 3 and row["cpu_over_peer"] == 2 and row["kept_by_both"] == 0.2
    assert row["pages_per_second"] == 2.5 and row["pages_per_second_after_start"] == 3
    row = _row(ours, [ours, theirs], 30, 2)
    assert row == {
        "name": "moebius",
        "pages": 30,
        "pages_per_second": 7.5,
        "start_seconds": 1.0,
        "kept": 4,
        "pages_per_second_after_start": 10,
    }
    assert _differences([ours, theirs]) == [
        "kept by moebius alone: 3 (not read or not extracted 2, c4: too_few_sentences 1)",
        "kept by datatrove alone: 1 (01-extract: no text found 1)",
    ]
