"""The printed form of a plan for a cluster."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moebius.lab.planner.search import Report

SHORT = {"dp_replicate": "replicas", "dp_shard": "fsdp"}


def render_training(report: Report) -> RenderableType:
    """The best layouts of a training plan."""
    columns = ("layout", "micro-batch", "chunks", "memory", "step", "MFU", "tokens/day")
    table = _table(report, f"steps of {report['tokens_per_step']:,} tokens", *columns)
    table.add_column("$ per 1T tokens", justify="right")
    for row in report["best"]:
        degrees = " ".join(f"{SHORT.get(k, k)}={v}" for k, v in row["layout"].items() if v > 1)
        setting = row["setting"]
        flags = [" recompute"] * setting["recompute"] + [" reshard"] * setting["reshard"]
        table.add_row(
            (degrees or "one device") + "".join(flags),
            str(setting["micro_batch"]),
            str(setting["chunks"]),
            f"{row['memory_bytes'] / 1e9:.1f} GB",
            f"{row['seconds']:.3g} s",
            f"{row['mfu']:.1%}",
            f"{row['tokens_per_day']:.3g}",
            f"{row['dollars_per_trillion']:,.0f}",
        )
    return Group(table, *_notes(report))


def render_inference(report: Report) -> RenderableType:
    """The best layouts of a decoding plan."""
    columns = ("layout", "sequences", "memory", "ms per token", "tokens/s", "$ per 1M tokens")
    table = _table(report, "decoding, per device", *columns)
    for row in report["best"]:
        table.add_row(
            row["layout"],
            str(row["batch"]),
            f"{row['memory'] / 1e9:.1f} GB",
            f"{row['per_token'] * 1e3:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['dollars']:.3g}",
        )
    return Group(table, *_notes(report))


def _table(report: Report, what: str, *columns: str) -> Table:
    title = (
        f"{report['recipe']} on {report['cluster']}: {what}, context {report['context']:,}, "
        f"{report['precision']}"
    )
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _notes(report: Report) -> list[Text]:
    lines = [
        f"{report['layouts']:,} legal layouts, {report['not_fitting']:,} of them do not fit in "
        f"memory; ${report['price']:.2f} a device and hour"
    ]
    if "whole_run" in report:
        lines.append(
            f"steps take {report['whole_run']} times as long as their kernels and links, as "
            "published runs did"
        )
    if not report["measured"]:
        lines.append("rates of this device are H100's shares of the peaks, not measured on it")
    return [Text(line) for line in lines]
