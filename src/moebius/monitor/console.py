"""The live display of a training run, and the table that closes it.

On a terminal: one panel that is redrawn in place. Anywhere else (a pipe, a log file): a plain line
now and then, and at the last step, without control codes.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moebius.monitor.text import BASELINES, count, decimal, duration, number, percent, printable

_SHOWN_ALARMS = 3


@final
class LiveDisplay:
    """Shows the newest line of metrics; `with LiveDisplay(steps) as display: ...`.

    `steps` is where the run ends. `clock` gives seconds and only paces the plain lines, at most one
    in `every` seconds.
    """

    def __init__(
        self,
        steps: int,
        console: Console | None = None,
        every: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps = steps
        self._console = console if console is not None else Console()
        self._every = every
        self._clock = clock
        self._name = ""
        self._first: Mapping[str, Any] | None = None
        self._alarms: list[str] = []
        self._printed_at: float | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def start(self, run_name: str, facts: Mapping[str, str]) -> None:
        """Print the run's name and the facts it starts from, then open the display."""
        self._name = printable(run_name)
        self._print(Text(self._name, style="bold"))
        width = max((len(key) for key in facts), default=0)
        for key, value in facts.items():
            self._print(Text.assemble((f"  {key:<{width}}  ", "dim"), printable(value)))
        if self._console.is_terminal:
            self._live = Live(Text(""), console=self._console, refresh_per_second=4)
            self._live.start()

    def update(self, line: Mapping[str, Any]) -> None:
        """Show a line of metrics; its new alarms stay in view (the last three) or are printed."""
        if self._first is None:
            self._first = line
        alarms = [f"step {line['step']}: {printable(text)}" for text in line.get("alarms") or ()]
        self._alarms += alarms
        if self._live is not None:
            self._live.update(self._panel(line))
            return
        for text in alarms:
            self.message(f"ALARM {text}")
        now = self._clock()
        due = self._printed_at is None or now - self._printed_at >= self._every
        if due or line["step"] >= self._steps:
            self._printed_at = now
            self.message(self._plain(line))

    def message(self, text: str) -> None:
        """Print a line of text above the display."""
        self._print(Text(printable(text)))

    def finish(self, table: RenderableType | None = None) -> None:
        """Close the display and print the closing table."""
        self._stop()
        for text in self._alarms[:-_SHOWN_ALARMS] if self._console.is_terminal else ():
            self.message(f"ALARM {text}")
        if table is not None:
            self._console.print(table)

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _left(self, line: Mapping[str, Any]) -> float | None:
        """Seconds to the last step, at the mean pace since this process began to log."""
        first = self._first if self._first is not None else line
        seconds, began = number(line, "seconds"), number(first, "seconds")
        done = line["step"] - first["step"]
        if seconds is None or began is None or done <= 0:
            return None
        return (seconds - began) / done * max(0, self._steps - line["step"])

    def _plain(self, line: Mapping[str, Any]) -> str:
        parts = [
            f"step {line['step']}/{self._steps}",
            *(f"{key} {value}" for key, value in _readings(line).items()),
            f"left {duration(self._left(line))}",
        ]
        return "  ".join(parts)

    def _panel(self, line: Mapping[str, Any]) -> Panel:
        step = line["step"]
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        place = f"{step}/{self._steps}  left {duration(self._left(line))}"
        bar.add_row(ProgressBar(total=self._steps, completed=step), place)
        readings = Table.grid(padding=(0, 2))
        readings.add_column(style="dim", no_wrap=True)
        readings.add_column()
        for key, value in _readings(line).items():
            readings.add_row(key, Text(value))
        rows: list[RenderableType] = [bar, readings]
        rows += [Text(text, style="bold red") for text in self._alarms[-_SHOWN_ALARMS:]]
        return Panel(Group(*rows), title=Text(self._name), title_align="left", box=box.ROUNDED)


def _readings(line: Mapping[str, Any]) -> dict[str, str]:
    """What the display shows of a line: name -> text, missing things left out."""
    shown = {
        "loss": decimal(number(line, "loss"), 4),
        "bits/byte": decimal(number(line, "bits_per_byte"), 4),
        "tokens/s": count(number(line, "tokens_per_second")),
        "MFU": percent(number(line, "mfu")),
        "FFN experts": _experts(line),
        "balance": _balance(line),
    }
    skipped = number(line, "skipped")
    if skipped:
        shown["skipped"] = f"{skipped:.0f} updates"
    return {key: value for key, value in shown.items() if value != "-" or key == "loss"}


def _experts(line: Mapping[str, Any]) -> str:
    means = [number(stats, "ffn_mean") for stats in line.get("layers", {}).values()]
    known = [mean for mean in means if mean is not None]
    if not known:
        return "-"
    text = f"{sum(known) / len(known):.2f} a token"
    low, mean, high = (number(line, f"active_{which}") for which in ("min", "mean", "max"))
    if mean is None:
        return text
    return f"{text} (active {count(mean)}, {count(low)} to {count(high)})"


def _balance(line: Mapping[str, Any]) -> str:
    """The worst layer's load CV and the worst layer's highest load, each with its layer."""
    parts = []
    for key, name in (("load_cv", "CV"), ("max_load", "max load")):
        layers = line.get("layers", {}).items()
        found = [(number(stats, key), layer) for layer, stats in layers]
        known = [(value, layer) for value, layer in found if value is not None]
        if known:
            value, layer = max(known)
            parts.append(f"{name} {percent(value)} (layer {layer})")
    return ", ".join(parts) or "-"


def summary_table(summary: Mapping[str, Any], report: Path | None = None) -> Table:
    """The closing table: bits per byte beside the compressors', sizes, speed, sample, report."""
    table = Table(box=box.SIMPLE_HEAD, show_header=True, title_justify="left")
    table.add_column("validation", style="dim", no_wrap=True)
    table.add_column("bits per byte")
    ours = number(summary, "val_bits_per_byte")
    table.add_row("this model", Text(decimal(ours), style="bold"))
    for key, name in BASELINES.items():
        value = number(summary, key)
        if value is not None:
            verdict = "" if ours is None else f"  {_verdict(ours, value)}"
            table.add_row(name, decimal(value) + verdict)
    table.add_section()
    for name, value in _facts(summary).items():
        table.add_row(name, Text(printable(value)))
    if report is not None:
        table.add_row("report", Text(printable(str(report)), overflow="fold"))
    return table


def _verdict(ours: float, theirs: float) -> str:
    return f"(model {abs(1 - ours / theirs):.1%} {'below' if ours < theirs else 'above'})"


def _facts(summary: Mapping[str, Any]) -> dict[str, str]:
    low, high = number(summary, "params_active_min"), number(summary, "params_active_max")
    active = count(number(summary, "params_active_mean"))
    spread = f" ({count(low)} to {count(high)} a token)" if low != high else ""
    facts = {
        "active parameters": active + spread if active != "-" else "-",
        "total parameters": count(number(summary, "params_total")),
        "tokens/s": count(number(summary, "tokens_per_second")),
        "tokens": count(number(summary, "tokens")),
        "time": duration(number(summary, "seconds")),
        "precision": str(summary.get("precision") or "-"),
    }
    for layer, kept in (summary.get("ffn_experts") or {}).items():
        facts[f"FFN experts, layer {layer}"] = (
            f"{kept['mean']:.3f} a token over the last third (target {kept['target']:g}, worst 100 "
            f"steps {kept['worst_window']:.3f}), std over tokens {kept['std']:.2f}"
        )
    skipped = number(summary, "skipped_steps")
    if skipped:
        facts["skipped updates"] = f"{skipped:.0f}"
    if summary.get("sample"):
        facts["sample"] = str(summary["sample"])
    return {name: value for name, value in facts.items() if value != "-"}
