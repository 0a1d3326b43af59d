"""The report and the comparison: self-contained, escaped, complete, also for a run in progress."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from make_run import HOSTILE, NUM_FFN, NUM_ZERO, SUMMARY, layer, line, write_run
from plotly.offline import get_plotlyjs

from moebius.monitor.compare import compare_rows, write_comparison
from moebius.monitor.plots import smoothed, thin
from moebius.monitor.report import write_report
from moebius.monitor.runs import read_metrics

TOKENS = {
    "passage": [["def", 1.0], [" x", 3.0], [HOSTILE, 2.0], ["\n", None]],
    "by_token": [["def", 9, 1.25], [" x", 8, 2.75], [HOSTILE, 7, 2.0], ["rare", 1, 3.0]],
    "layers": 2,
}


class Page(HTMLParser):
    """The elements of a page, its figures' data and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.figures: dict[str, dict[str, Any]] = {}
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self._caption = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        is_data = tag == "script" and dict(attrs).get("type") == "application/json"
        self._inside = "json" if is_data else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "json":
            self.figures[self._caption] = json.loads(data)
        elif self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self._caption = data if self._inside == "h3" else self._caption
            self.text.append(data)


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [line(i) for i in range(1, 61)]
    lines[40]["alarms"] = ["collapse, layer 1: max load 0.3"]
    return write_run(
        tmp_path_factory.mktemp("runs") / "run",
        lines,
        summary=SUMMARY,
        tokens=TOKENS,
        events=[{"step": 7, "kind": "skipped", "message": "loss is not finite"}],
    )


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    path = write_report(finished)
    assert path == finished / "report.html"
    return read(path)


def test_every_plot_is_there_and_is_a_valid_plotly_figure(page: Page) -> None:
    assert list(page.figures) == [
        "Training loss", "Bits per byte", "Learning rate", "Router load", "Effective experts",
        "Load variation", "Highest load", "FFN experts per token",
        "Tokens by number of FFN experts", "Gradient norm", "Bias range", "Router similarity",
        "R_g", "Hidden norms", "Gradient RMS by role", "Update by role", "Throughput",
        "Model FLOP utilisation",
    ]  # fmt: skip
    for figure in page.figures.values():
        go.Figure(data=figure["data"], layout=figure["layout"])


def test_plots_hold_the_values_of_the_run(finished: Path, page: Page) -> None:
    lines = read_metrics(finished / "metrics.jsonl")
    raw = page.figures["Training loss"]["data"][0]
    assert raw["x"] == [item["step"] for item in lines]
    assert raw["y"] == pytest.approx([item["loss"] for item in lines], rel=1e-5)
    levels = {trace["name"]: trace["y"][0] for trace in page.figures["Bits per byte"]["data"][2:]}
    assert levels == {
        "validation": 1.4,
        "xz -9e, each file alone": 1.915,
        "xz -9e, all together": 1.476,
        "byte 5-gram": 1.7,
    }
    assert page.figures["Effective experts"]["data"][0]["y"][0] == pytest.approx(
        layer()["effective_experts"] / NUM_FFN, rel=1e-5
    )
    low, high = page.figures["FFN experts per token"]["data"][:2]
    assert (low["y"][0], high["y"][0]) == pytest.approx((1.3, 2.7))


def test_the_load_map_has_a_frame_for_every_step_up_to_sixty(page: Page) -> None:
    figure = page.figures["Router load"]
    assert [choice["label"] for choice in figure["choices"]] == [f"step {i}" for i in range(1, 61)]
    grid = figure["choices"][0]["data"]["z"][0]
    outputs = NUM_FFN + NUM_ZERO
    assert grid[1] == pytest.approx([share * outputs for share in layer()["load"]], abs=1e-3)
    assert figure["layout"]["shapes"][0]["x0"] == NUM_FFN - 0.5


def test_long_runs_are_thinned(tmp_path: Path) -> None:
    lines = [line(i) for i in range(1, 5002)]
    lines[2500]["loss"] = 99.0
    found = read(write_report(write_run(tmp_path / "run", lines)))
    loss = found.figures["Training loss"]["data"][0]
    assert len(loss["x"]) <= 2000 and max(loss["y"]) == 99.0
    assert (loss["x"][0], loss["x"][-1]) == (1, 5001)
    assert len(found.figures["Router load"]["choices"]) == 60


def test_nothing_remote_is_loaded(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    assert "default-src 'none'" in str([item for tag, item in page.tags if tag == "meta"])
    assert page.scripts.count(get_plotlyjs()) == 1


def test_figures_tokens_and_alarms_are_shown(page: Page) -> None:
    text = "|".join(page.text)
    for part in ("5.1M", "24.3M", "7m 12s", "collapse, layer 1", "loss is not finite", "1 alarms"):
        assert part in text
    shades = [
        (attributes.get("class"), attributes.get("title"))
        for tag, attributes in page.tags
        if tag == "span" and "title" in attributes
    ]
    assert shades == [("h0", "1.00"), ("h8", "3.00"), ("h4", "2.00")]
    assert "1 rarer ones are left out" in text and "rare" not in page.text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    lines = [line(i, alarms=[HOSTILE]) for i in range(1, 5)]
    for item in lines:
        item["roles"] = {HOSTILE: {"grad_rms": 1e-4}}
    folder = write_run(
        tmp_path / "run",
        lines,
        name=HOSTILE,
        recipe={HOSTILE: HOSTILE},
        summary={**SUMMARY, "sample": HOSTILE, "precision": HOSTILE},
        tokens=TOKENS,
        events=[{"step": 1, "kind": HOSTILE, "message": HOSTILE}],
    )
    other = write_run(tmp_path / "other", lines, name=HOSTILE, recipe={HOSTILE: "b"})
    for path in (write_report(folder), write_comparison([folder, other], tmp_path / "c.html")):
        source = path.read_text(encoding="utf-8").replace(get_plotlyjs(), "")
        assert "<img" not in source
        found = Page(source)
        assert not [tag for tag, _ in found.tags if tag == "img"]
        assert len(re.findall("</script>", source)) == sum(t == "script" for t, _ in found.tags)
    shown = read(folder / "report.html")
    assert shown.text.count(HOSTILE) >= 5
    names = [trace["name"] for trace in shown.figures["Gradient RMS by role"]["data"]]
    assert names == ["&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;"]


def test_a_log_axis_over_many_decades_is_labelled_by_decade(tmp_path: Path) -> None:
    roles = {"router": {"grad_rms": 1e-9}, "matrix": {"grad_rms": 1e-3}}
    folder = write_run(tmp_path / "run", [line(i, roles=roles) for i in range(1, 4)])
    figures = read(write_report(folder)).figures
    assert figures["Gradient RMS by role"]["layout"]["yaxis"]["dtick"] == 1
    assert figures["Hidden norms"]["layout"]["yaxis"]["dtick"] == "D2"


def test_a_run_in_progress_has_a_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [line(1), line(2)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    text = "|".join(read(write_report(folder)).text)
    assert "in progress or stopped at step 2" in text
    assert "Left out: a torn last line of metrics.jsonl." in text


def test_a_run_that_logs_little_has_few_plots(tmp_path: Path) -> None:
    bare = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 2.0}]
    found = read(write_report(write_run(tmp_path / "bare", bare)))
    assert list(found.figures) == ["Training loss"]
    assert found.figures["Training loss"]["data"][0]["x"] == [1, 3]
    empty = read(write_report(write_run(tmp_path / "empty", [])))
    assert empty.figures == {}


def test_many_layers_use_a_map_of_the_distribution(tmp_path: Path) -> None:
    lines = [line(i, layers={str(k): layer() for k in range(12)}) for i in range(1, 4)]
    found = read(write_report(write_run(tmp_path / "run", lines)))
    figure = found.figures["Tokens by number of FFN experts"]
    assert figure["data"][0]["type"] == "heatmap"
    assert figure["data"][0]["z"][11] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert figure["data"][0]["y"][-2:] == ["layer 10", "layer 11"]
    go.Figure(data=figure["data"], layout=figure["layout"])


def test_comparison_overlays_runs_and_lists_differences(tmp_path: Path) -> None:
    recipe = {"steps": 60, "optim": {"lr": 1e-3}}
    first = write_run(tmp_path / "a", [line(i) for i in range(1, 21)], "a", recipe, summary=SUMMARY)
    changed = {"steps": 60, "optim": {"lr": 2e-3}, "seed": 1}
    second = write_run(tmp_path / "b", [line(i) for i in range(1, 11)], "b", changed)
    found = read(write_comparison([first, second], tmp_path / "compare.html"))
    loss = found.figures["Training loss"]
    assert [(trace["name"], len(trace["x"])) for trace in loss["data"]] == [("a", 20), ("b", 10)]
    assert [choice["label"] for choice in loss["choices"]] == ["steps", "tokens", "seconds"]
    assert loss["choices"][1]["data"]["x"][1] == [100.0 * i for i in range(1, 11)]
    for figure in found.figures.values():
        go.Figure(data=figure["data"], layout=figure["layout"])
    cells = [text for text in found.text if text.strip()]
    start = cells.index("optim.lr")
    assert cells[start : start + 6] == ["optim.lr", "0.001", "0.002", "seed", "-", "1"]
    assert "steps" not in cells[start:]


def test_compare_rows_are_plain_figures(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", [line(20)], "a", summary=SUMMARY)
    second = write_run(tmp_path / "b", [line(10, skipped=2)], "b")
    done, stopped = compare_rows([first, second])
    assert json.loads(json.dumps(done)) == done
    assert (done["steps"], done["val_bits_per_byte"], done["state"]) == (20, 1.4, "finished")
    assert (stopped["steps"], stopped["val_bits_per_byte"]) == (10, None)
    assert (stopped["skipped_steps"], stopped["load_cv"], stopped["ffn_mean"]) == (2, 0.1, 2.0)


def test_runs_of_one_name_are_told_apart_by_folder(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, [line(1), line(2)], "same") for name in "ab"]
    found = read(write_comparison(folders, tmp_path / "compare.html"))
    names = [trace["name"] for trace in found.figures["Training loss"]["data"]]
    assert names == [str(folder) for folder in folders]


def test_comparing_nothing_or_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_rows([])
    with pytest.raises(ValueError, match="not a run folder"):
        write_comparison([tmp_path], tmp_path / "compare.html")
    assert not (tmp_path / "compare.html").exists()
    with pytest.raises(ValueError, match="there is no run folder"):
        write_report(tmp_path / "missing")


def test_thinning_keeps_ends_and_extremes() -> None:
    ys = [float(i % 7) for i in range(10_000)]
    ys[1234], ys[8765] = 50.0, -50.0
    xs = [float(i) for i in range(10_000)]
    kept, values = thin((xs, ys), 100)
    assert len(kept) <= 100 and kept == sorted(kept)
    assert (kept[0], kept[-1]) == (0.0, 9999.0)
    assert {50.0, -50.0} <= set(values)
    assert all(ys[int(x)] == y for x, y in zip(kept, values, strict=True))


def test_smoothing_is_a_centred_mean() -> None:
    xs = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert smoothed((xs, [0.0, 3.0, 6.0, 0.0, 3.0]), 2) == (xs, [0.0, 3.0, 3.0, 3.0, 1.5])
