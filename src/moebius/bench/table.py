"""The printed form of a benchmark."""

from typing import Any

from rich.table import Table


def rows_table(result: dict[str, Any]) -> Table:
    """A table of a `bench step` result."""
    title = (
        f"{result['device']}, {result['precision']}, {result['threads']} threads; "
        f"plain products {result['matmul_flops'] / 1e9:,.0f} GFLOP/s; experts: {result['experts']}"
    )
    table = Table(title=title, title_justify="left", box=None)
    for column in ("", "tokens/s", "MFU", "step, s", "over twin", "active", "total", "agrees"):
        table.add_column(column, justify="left" if column == "" else "right")
    for row in result["rows"]:
        ratio = row["step_over_twin"]
        table.add_row(
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['mfu']:.1%}",
            f"{row['seconds']:.3f}",
            "-" if ratio is None else f"{ratio:.2f}",
            f"{row['params_active_mean'] / 1e6:.2f}M",
            f"{row['params_total'] / 1e6:.2f}M",
            "yes" if row["agrees"] else "NO",
        )
    return table
