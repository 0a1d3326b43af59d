"""The page: whole and harmless whatever the documents, the counts and the files are."""

import html.parser
import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="parquet needs the curate extra")

from moebius.curate.report import write_report
from moebius.curate.report.counted import read_counted
from moebius.curate.report.page import DROPPED, KEPT
from moebius.curate.report.sample import Budget, Sampler
from moebius.curate.report.words import safe, share, size

from .making import Made, random_made, row, write_rows

EVIL = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg/onload=alert(3)>"
    "&lt;b&gt;\x00\x1b[31m\u202eevil</pre></article><!-- ]]> <a href='javascript:alert(4)'>"
)
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Reader(html.parser.HTMLParser):
    """What a browser would find: elements in order, attributes, text by element; balance."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def read_page(folder: Path) -> tuple[str, Reader]:
    """The written page, parsed; its tags must balance."""
    path = write_report(folder)
    assert path == folder / "report.html"
    page = path.read_text(encoding="utf-8")
    # The library for plots is long and no concern of this test.
    start = page.index("</main>")
    shown = page[:start] + "</main></body></html>"
    reader = Reader()
    reader.feed(shown)
    reader.close()
    assert not reader.wrong and not reader.open
    return shown, reader


def plots_of(reader: Reader) -> list[dict]:
    return [json.loads(text) for text in reader.text.get("script", [])]


# --- what it shows --------------------------------------------------------------------------------


def test_every_count_reason_and_example_is_there(tmp_path: Path) -> None:
    made = Made(["extract", "too_short"], changed={0: 2})
    made.kept = [
        row(f"k{i}", f"kept text {i} " * 30, language="eng", lineage=["extract"]) for i in range(3)
    ]
    made.kept.append(row("b0", "a book " * 400, source="books", kind="prose", language="fra"))
    page = row("p0", "", raw=b"<html>\xff raw page 0</html>", detail="no body", url="http://a/0")
    made.dropped = [(0, "no main text", page)]
    short = [row(f"s{i}", f"short {i}", language="deu", detail=f"{i} words") for i in range(4)]
    made.dropped += [(1, "too few words", one) for one in short]
    made.unread = {"web": {"not HTML": [7, 1234]}}
    shown, reader = read_page(made.write(tmp_path))
    for text in ("too few words", "no main text", "not HTML", "a book"):
        assert text in shown
    assert len(re.findall(r'<div class="why">\d words</div>', shown)) == 3
    assert "&lt;html&gt;\ufffd raw page 0&lt;/html&gt;" in shown and "of raw page" in shown
    assert "http://a/0" in shown and "Kept, and changed here" in shown and "kept text 1" in shown
    cells = "|".join(text.strip() for text in reader.text["td"])
    assert "1. extract|9|8|1|11.1%|2|" in cells and "2. too_short|8|4|4|50.0%|0|" in cells
    assert "web|not HTML|7|1.23 kB" in cells
    (drawn,) = [x for x in (attrs.get("aria-label") for _, attrs in reader.found) if x][:1]
    assert drawn == "The corpus step by step, by documents"
    # 0.5 seconds for nine documents, then for eight.
    assert "|18|0.5s" in cells and "|16|0.5s" in cells


def test_histograms_stand_for_all_documents(tmp_path: Path) -> None:
    made = random_made(steps=3, reasons=2, documents=900)
    _, reader = read_page(made.write(tmp_path, files=3))
    length, language, quality = plots_of(reader)
    for plot in (length, quality):
        before, kept = plot["data"]
        assert sum(before["y"]) == pytest.approx(900) and sum(kept["y"]) == len(made.kept)
        assert all(b >= k for b, k in zip(before["y"], kept["y"], strict=True))
    counts = dict(zip(language["data"][1]["x"], language["data"][1]["y"], strict=True))
    for name in ("eng", "fra", "zho"):
        assert counts[name] == sum(one["language"] == name for one in made.kept)
    assert counts["unknown"] == sum(one["language"] == "" for one in made.kept)
    num_bytes = length["choices"][1]["data"]["y"]
    assert sum(num_bytes[1]) == pytest.approx(sum(len(r["text"].encode()) for r in made.kept))


def test_a_sample_is_weighted_by_what_it_stands_for(tmp_path: Path) -> None:
    folder = random_made(steps=1, reasons=1, documents=400).write(tmp_path)
    counts = json.loads((folder / "counts.json").read_text())
    counts["kept"]["documents"] *= 1000
    (folder / "counts.json").write_text(json.dumps(counts))
    _, reader = read_page(folder)
    kept = plots_of(reader)[0]["data"][1]
    assert sum(kept["y"]) == pytest.approx(counts["kept"]["documents"], rel=1e-3)


# --- sizes ----------------------------------------------------------------------------------------


def test_nothing_at_all(tmp_path: Path) -> None:
    folder = Made([]).write(tmp_path / "none")
    shown, reader = read_page(folder)
    assert "No document was read" in shown and not plots_of(reader)
    empty = Made(["c4"], unread={"web": {"gone": [1, 0]}}).write(tmp_path / "empty")
    assert "No document was read" in read_page(empty)[0]
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "counts.json").write_text("{}")
    assert "No document was read" in read_page(alone)[0]


def test_one_step_that_drops_all(tmp_path: Path) -> None:
    made = Made(["c4", "minhash"])
    made.dropped = [(0, "too few sentences", row(f"{i}", "word")) for i in range(5)]
    shown, _ = read_page(made.write(tmp_path))
    assert "nothing came" in shown and "100.0%" in shown


def test_forty_steps_and_a_hundred_reasons(tmp_path: Path) -> None:
    made = random_made(steps=40, reasons=100, documents=4000)
    shown, _ = read_page(made.write(tmp_path, files=1, rows_a_group=500))
    assert all(f"{i + 1}. step_{i}" in shown for i in range(40))
    reasons = {(step, why) for step, why, _ in made.dropped}
    assert len(reasons) > 1500 and all(why in shown for _, why in reasons)
    assert "further reasons" in shown and "No document of it was found" not in shown
    numbers = re.findall(r'(?:[ "MCLVHQ])(-?[\d.]+|nan|inf)(?=[ "CLVHQZ])', shown)
    assert len(numbers) > 1000 and all(float(x) == float(x) for x in numbers)
    assert len(shown) < 4_000_000


def test_bands_and_trunk_are_in_proportion(tmp_path: Path) -> None:
    """All widths at a step are documents times one scale, drawn wider where little is left."""
    made = Made(["a", "b"])
    made.dropped = [(0, "much", row(f"m{i}", "x")) for i in range(600)]
    made.dropped += [(0, "some", row(f"s{i}", "x")) for i in range(300)]
    made.dropped += [(1, "late", row(f"l{i}", "x")) for i in range(50)]
    made.kept = [row(f"k{i}", "x", source="web" if i % 5 else "books") for i in range(50)]
    shown, _ = read_page(made.write(tmp_path))
    drawing = shown[shown.index("<svg") : shown.index("</svg>")]
    assert "drawn 10 times as wide from here on" in drawing
    bands = dict(
        re.findall(r'class="drop" d="[^"]*?H680\.00V([\d.]+)H[^"]*"><title>(\w+): ', drawing)
    )
    tops = re.findall(r'class="drop" d="M[\d.]+ [\d.]+V[\d.]+Q[\d.]+ ([\d.]+) ', drawing)
    thick = {
        name: float(low) - float(top) for (low, name), top in zip(bands.items(), tops, strict=True)
    }
    assert thick == {
        "much": pytest.approx(0.6 * 380, abs=0.02),
        "some": pytest.approx(0.3 * 380, abs=0.02),
        "late": pytest.approx(0.05 * 380 * 10, abs=0.02),
    }
    nodes = [
        float(x)
        for x in re.findall(r'class="node ?\w*" x="[\d.]+" y="[\d.]+" width="([\d.]+)"', drawing)
    ]
    assert nodes == [380, 380, 380, 190]


def test_what_a_step_passes_by_stays_in_the_trunk(tmp_path: Path) -> None:
    """A step counts what it saw alone; the drawing is of all that is there."""
    made = Made(["01-page_rule", "02-all"])
    made.kept = [row(f"b{i}", "x" * 10, source="books") for i in range(60)]
    made.kept += [row(f"w{i}", "x" * 10) for i in range(20)]
    made.dropped = [(0, "a page", row(f"d{i}", "x" * 10)) for i in range(20)]
    counts = made.counts()
    (first, second) = counts["steps"]
    first |= {"in": [40, 400], "out": [20, 200], "by_source": {"web": {"in": [40, 400]}}}
    first["by_source"]["web"]["out"] = [20, 200]
    folder = made.write(tmp_path)
    (folder / "counts.json").write_text(json.dumps(counts))
    shown, _ = read_page(folder)
    drawing = shown[shown.index("<svg") : shown.index("</svg>")]
    assert "100 \u2192 80 \u00b7 \u221220.0%" in drawing and "it saw 40 of 100" in drawing
    assert "a page \u00b7 20 \u00b7 50.0%" in drawing and "80 \u00b7 nothing dropped" in drawing
    assert ">1. page_rule<" in drawing and ">2. all<" in drawing
    nodes = re.findall(r'class="node ?\w*" x="[\d.]+" y="[\d.]+" width="([\d.]+)"', drawing)
    assert [float(x) for x in nodes] == [380, 380, 304, 304]
    assert second["in"] == [80, 800]


# --- hostile --------------------------------------------------------------------------------------


def strange(folder: Path, text: str) -> tuple[str, Reader]:
    """The page of a curation all of whose texts are this one."""
    made = Made([text], changed={0: 1})
    told = {"source": text, "kind": text, "url": text, "date": text, "language": text}
    told |= {"labels": {text: text}, "lineage": [text], "detail": text}
    rows = [row(f"{text}{i}", text * 40, **told, scores={text: i}) for i in range(4)]
    made.kept = rows[:3]
    made.dropped = [(0, text, rows[3])]
    made.unread = {text: {text: [1, 1]}}
    counts = made.counts()
    # Folders of steps have other names on disk.
    made.steps = ["step"]
    made.write(folder, files=1)
    (folder / "counts.json").write_text(json.dumps(counts))
    (folder / "curation.json").write_text(json.dumps({"name": text + "\ud800"}))
    return read_page(folder)


def test_no_text_of_a_document_is_anything_but_text(tmp_path: Path) -> None:
    shown, reader = strange(tmp_path / "evil", EVIL)
    _, plain = strange(tmp_path / "plain", "harmless")
    # The same elements with the same attributes in the same order as among harmless texts.
    assert [(tag, set(attrs)) for tag, attrs in reader.found] == [
        (tag, set(attrs)) for tag, attrs in plain.found
    ]
    assert "alert(1)" in shown and "alert(3)" in shown
    assert not set("\x00\x1b\u202e\ud800") & set(shown)
    plots = plots_of(reader)
    assert len(plots) == 3
    for plot in plots:
        assert "<" not in json.dumps([plot["data"], plot["layout"], plot["choices"]])
    policy = next(attrs["content"] for tag, attrs in reader.found if "content" in attrs)
    assert str(policy).startswith("default-src 'none'; script-src 'sha256-")


def test_damaged_and_missing_files_are_told(tmp_path: Path) -> None:
    folder = random_made(steps=2, reasons=2, documents=200).write(tmp_path, files=4)
    (folder / "documents/part-1.parquet").write_bytes(b"PAR1 torn")
    whole = (folder / "documents/part-2.parquet").read_bytes()
    (folder / "documents/part-2.parquet").write_bytes(whole[: len(whole) // 2])
    shutil.rmtree(folder / "dropped/02-step_1")
    for name in ("timing.json", "curation.json"):
        (folder / name).write_text("[}")
    shown, _ = read_page(folder)
    assert "2 file(s) or parts of files could not be read" in shown
    assert "No document of it was found" in shown


@pytest.mark.parametrize("text", ["", "[1", "\xff"])
def test_a_folder_without_counts_is_refused(text: str, tmp_path: Path) -> None:
    if text:
        (tmp_path / "counts.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="is no finished curation") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "report.html").exists()


def test_senseless_counts_are_read_as_nothing(tmp_path: Path) -> None:
    data = {
        "sources": {"a": {"documents": 5, "bytes": True}, "b": [3], "c": None},
        "unread": {"a": 3},
        "steps": [{"name": None, "in": [5, "x"], "dropped": {"r": [-2, 1e400]}, "by_source": 4}, 7],
        "kept": [],
    }
    (tmp_path / "counts.json").write_text(json.dumps(data).replace("Infinity", "1e999"))
    counted = read_counted(tmp_path)
    assert counted.read == (8, 0) and len(counted.steps) == 2 and counted.kept == (0, 0)
    assert counted.steps[0].dropped == {"r": (0, 0)}
    read_page(tmp_path)


# --- sampling -------------------------------------------------------------------------------------


def test_a_sample_is_bounded_and_the_same_every_time(tmp_path: Path) -> None:
    for i in range(8):
        rows = [row(f"{i}-{k}", f"text {i} {k} " * 50) for k in range(400)]
        write_rows(tmp_path / f"documents/group-{i % 2}/part-{i}.parquet", rows, 40)
    budget = Budget(rows=300, bytes=1 << 30, examples=5)
    first, again = (Sampler().take(tmp_path / "documents", budget) for _ in range(2))
    assert first == again and len(first.rows) == 300 and first.files == 8
    assert len(first.examples[""]) == 5
    # Row groups of several files, not the beginning of one.
    wide = Sampler().take(tmp_path / "documents", Budget(1000, 1 << 30, 1000))
    assert len({example.key.partition("-")[0] for example in wide.examples[""]}) > 3
    few = Sampler().take(tmp_path / "documents", Budget(10**6, 1, 5))
    assert len(few.rows) == 40


def test_a_rare_reason_is_found_beyond_the_sample(tmp_path: Path) -> None:
    rows = [row(f"{i}", "x", reason="common", detail="") for i in range(3000)]
    rows[2777] |= {"reason": "rare", "key": "the one", "text": "y" * 3_000_000}
    write_rows(tmp_path / "part-0.parquet", rows, 500)
    sample = Sampler().take(tmp_path, Budget(100, 1, 2), ["common", "rare", "never"])
    assert set(sample.examples) == {"common", "rare"} and len(sample.rows) == 100
    (found,) = sample.examples["rare"]
    assert found.key == "the one" and found.num_bytes == 3_000_000 and len(found.text) < 1000
    assert KEPT.examples >= DROPPED.examples


def test_rows_without_columns_or_with_senseless_ones(tmp_path: Path) -> None:
    rows = [{"key": "a", "text": "x", "scores": "[1]", "labels": "{", "lineage": "[" * 10**5}]
    rows += [{"key": None, "text": None, "scores": '{"s": 1e999, "t": 1, "u": "1"}'}]
    rows += [{"key": "c", "text": "z", "scores": '{"s": NaN, "v": true}', "labels": '{"l": [1]}'}]
    write_rows(tmp_path / "part-0.parquet", [{**rows[0], **one} for one in rows])
    found = {one.key: one for one in Sampler().take(tmp_path, KEPT).examples[""]}
    assert found["a"].scores == {} and found["a"].lineage == () and found["a"].labels == {}
    assert found[""].scores == {"t": 1.0} and found[""].num_bytes == 0
    assert found["c"].scores == {} and found["c"].labels == {"l": "[1]"}


def test_words() -> None:
    assert [size(x) for x in (0, 999, 1000, 45_678, 10**9)] == [
        "0 B",
        "999 B",
        "1 kB",
        "45.7 kB",
        "1 GB",
    ]
    assert [share(*x) for x in ((0, 0), (0, 5), (1, 3), (4, 10**4), (1, 10**9))] == [
        "-",
        "0.0%",
        "33.3%",
        "0.04%",
        "<0.0001%",
    ]
    assert safe("a<b>&\x07" + "x" * 200, 6) == "a&lt;b&gt;&amp;\u2026"
