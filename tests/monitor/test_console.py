"""The display: plain lines on a pipe, a panel on a terminal, and the closing table."""

import io
from pathlib import Path
from typing import Any

from make_run import SUMMARY, line
from rich.console import Console

from moebius.monitor.console import LiveDisplay, summary_table
from moebius.monitor.text import count, duration, printable, visible


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def pipe() -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_pipe_gets_plain_lines_now_and_then_and_the_last() -> None:
    console, clock = pipe(), Clock()
    with LiveDisplay(20, console, clock=clock) as display:
        display.start("toy-1", {"corpus": "[bold]stdlib", "device": "cpu"})
        for step in range(1, 21):
            clock.now = step * 1.0
            display.update(line(step))
        display.finish()
    lines = text_of(console).splitlines()
    assert lines[:3] == ["toy-1", "  corpus  [bold]stdlib", "  device  cpu"]
    steps = [text.split()[1] for text in lines[3:]]
    assert steps == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    assert "\x1b" not in text_of(console)


def test_a_plain_line_shows_the_run_at_a_glance() -> None:
    console, clock = pipe(), Clock()
    display = LiveDisplay(100, console, clock=clock)
    display.start("toy", {})
    display.update(line(10))
    clock.now = 9.0
    active = {"active_min": 3.1e6, "active_mean": 5.1e6, "active_max": 6.2e6}
    display.update(line(20, mfu=0.312, loss=2.5, **active))
    shown = text_of(console).splitlines()[-1]
    for part in (
        "step 20/100",
        "loss 2.5000",
        "tokens/s 200",
        "MFU 31.2%",
        "FFN experts 2.00 a token (active 5.1M, 3.1M to 6.2M)",
        "balance CV 10.0% (layer 1), max load 9.2% (layer 1)",
        "left 40s",  # 80 steps at half a second
    ):
        assert part in shown


def test_alarms_are_printed_at_once_on_a_pipe() -> None:
    console, clock = pipe(), Clock()
    display = LiveDisplay(100, console, clock=clock)
    display.start("toy", {})
    display.update(line(1))
    display.update(line(2, alarms=["collapse, layer 1: [red]x\x1b[2J"]))
    assert text_of(console).splitlines()[-1] == ("ALARM step 2: collapse, layer 1: [red]x\ufffd[2J")


def test_a_line_with_only_step_and_loss_is_shown() -> None:
    console = pipe()
    display = LiveDisplay(10, console)
    display.start("toy", {})
    display.update({"step": 1, "loss": None})
    assert text_of(console).splitlines()[-1] == "step 1/10  loss -  left -"


def test_a_terminal_gets_a_panel() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, _environ={})
    with LiveDisplay(100, console) as display:
        display.start("toy", {})
        display.update(line(10))
        display.update(line(20, alarms=["collapse, layer 1"]))
        display.message("saved")
        display.finish(summary_table(SUMMARY))
    shown = text_of(console)
    for part in ("20/100  left 40s", "step 20: collapse, layer 1", "saved", "this model"):
        assert part in shown


def table_text(summary: dict[str, Any], report: Path | None = None) -> str:
    console = pipe()
    console.print(summary_table(summary, report))
    return text_of(console)


def test_the_closing_table_sets_the_model_beside_the_compressors() -> None:
    shown = table_text(SUMMARY, Path("runs/toy-1/report.html"))
    rows = {" ".join(row.split()) for row in shown.splitlines()}
    assert "this model 1.400" in rows
    assert "xz -9e, each file alone 1.915 (model 26.9% below)" in rows
    assert "xz -9e, all together 1.476 (model 5.1% below)" in rows
    assert "byte 5-gram 1.700 (model 17.6% below)" in rows
    assert "active parameters 5.1M (3.1M to 6.2M a token)" in rows
    assert "report runs/toy-1/report.html" in rows
    assert "return 1" in shown


def test_the_closing_table_says_when_the_model_is_worse() -> None:
    shown = table_text(
        {**SUMMARY, "val_bits_per_byte": 2.0, "sample": "[b]\x1b[31m", "skipped_steps": 2}
    )
    assert "(model 4.4% above)" in shown
    assert "[b]\ufffd[31m" in shown
    assert "2 updates" not in shown and "skipped updates" in shown


def test_short_texts() -> None:
    assert [count(x) for x in (0, 512, 999.9, 9130, 4.2e6, 27.15e9, None)] == [
        "0", "512", "1k", "9.13k", "4.2M", "27.1B", "-",
    ]  # fmt: skip
    assert [duration(x) for x in (0.4, 59.6, 432, 7380)] == ["0s", "1m 00s", "7m 12s", "2h 03m"]
    assert visible(" a\n\t\x00") == "\u2423a\u23ce\u21e5\ufffd"
    assert printable("a\x1b[0m\n") == "a\ufffd[0m\n"
