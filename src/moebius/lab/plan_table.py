"""The printed form of a plan."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moebius.lab.plan import Report

KV_NAMES = {"mha": "MHA", "gqa": "GQA", "mqa": "MQA", "cla": "CLA", "gqa_cla": "GQA + CLA"}


def render_plan(report: Report) -> RenderableType:
    """A plan as tables."""
    stages = [Text(text) for text in report["stages"]]
    parts: list[RenderableType] = [_groups(report), _costs(report), *stages]
    if "kv_table" in report:
        parts.append(_kv(report))
    if report["published"]:
        parts.append(_published(report))
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _number(value: float, digits: int = 4) -> str:
    """Some digits and a unit: 560.7B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def _bytes(value: float) -> str:
    for size, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(value) >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f} B"


def _groups(report: Report) -> Table:
    title = (
        f"{report['recipe']}: {report['layers']} layers, width {report['width']:,}, vocabulary "
        f"{report['vocab']:,}, context {report['context']:,}"
    )
    columns = ("parameters", "active: least", "mean", "most", "forward", "backward", "optimizer")
    table = _table(title, "", *columns)
    names = ("params_total", "params_active_min", "params_active_mean", "params_active_max")
    names = (*names, "flops_forward", "flops_backward")
    for row in report["groups"]:
        cells = [_number(row[name]) for name in names]
        table.add_row(row["group"].replace("_", " "), *cells, _bytes(row["optimizer_bytes"]))
    cells = [_number(report[name]) for name in names]
    table.add_row("in all", *cells, _bytes(report["memory"]["optimizer_bytes"]), style="bold")
    return table


def _costs(report: Report) -> Table:
    memory, plain = report["memory"], not report["memory"]["recompute"]
    table = _table("", "", "", "with recompute")
    table.add_row(
        "FLOPs per token, forward and backward",
        f"{_number(report['flops_train'])} (weights {_number(report['flops_train_weights'])})",
    )
    table.add_row("KV cache per token, bf16", f"{report['kv_bytes_per_token']:,} B")
    if report["kv_bytes_fixed"]:
        table.add_row("  of fixed length", _bytes(report["kv_bytes_fixed"]))
    table.add_row(f"  at {report['context']:,} tokens", _bytes(report["kv_bytes_at_context"]))
    for name, key in (("weights", "weights_bytes"), ("gradients", "gradients_bytes")):
        table.add_row(name, _bytes(memory[key]))
    table.add_row("optimizer", _bytes(memory["optimizer_bytes"]))
    table.add_row("head and loss", _bytes(memory["loss_bytes"]))
    rows = {
        "weights cast": "cast_bytes",
        "activations per token, at least": "activation_bytes_per_token",
        f"all, {memory['micro_batch_tokens']:,} tokens at once": "training_bytes",
    }
    for name, key in rows.items():
        cells = [_bytes(memory[key]), _bytes(memory[f"{key}_recompute"])]
        chosen = [f"[bold]{cell}[/bold]" if i != plain else cell for i, cell in enumerate(cells)]
        table.add_row(name, *chosen)
    return table


def _kv(report: Report) -> Table:
    table = _table("KV cache by attention, bf16", "", "bytes per token", "of MHA")
    for key, value in report["kv_table"].items():
        share = value / report["kv_table"]["mha"]
        table.add_row(KV_NAMES[key], f"{value:,}", f"{share:.2%}")
    return table


def _published(report: Report) -> Table:
    table = _table("Published", "", "published", "here", "deviation", "", "source")
    table.columns[-1].justify = "left"
    for key, row in report["published"].items():
        mark = Text("agrees", "green") if row["agrees"] else Text("MISMATCH", "bold red")
        whole = row["published"] < 1e7
        values = (row["published"], row["ours"])
        shown = [f"{value:,.0f}" if whole else _number(value, 6) for value in values]
        table.add_row(key, *shown, f"{row['deviation']:+.2%}", mark, row["source"])
    return table
