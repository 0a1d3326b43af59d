"""Does the best learning rate stay where it is as the model gets wider?

The rule of LongCat-Flash (3.1.1, table 1; Everett et al. 2407.05872, Adam, full alignment): rates
of hidden matrices and of the head go with 1 / width, those of embeddings and norms stay. One model
is trained at every width over a grid of rates, without the rule and with `transfer_from_width`; the
best rate of a width is the vertex of a parabola in log2(rate) through the points round the least
loss. At the width that the rule starts from both are the same run.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moebius.checkpoint.files import replace_file
from moebius.config import override
from moebius.data.config import DataConfig
from moebius.lab.draw import Chart, Line, write_charts
from moebius.lab.optimum import final_loss, fitted
from moebius.lab.trained import UNJUDGED, train_in
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.dense import Dense
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.monitor.runs import read_json, read_metrics
from moebius.optim.optimizer import OptimConfig
from moebius.optim.roles import default_roles
from moebius.optim.rules.adamw import AdamW
from moebius.optim.schedules.wsd import WSD
from moebius.train.run import Run
from moebius.train.session import Progress, Say

HEAD = 32
RATES = tuple(2.0**power for power in range(-11, -4))
MODES = ("off", "on")


def small(width: int) -> Run:
    """Two Llama-like layers whose every width is proportional, heads of 32; AdamW for all roles."""
    if width < HEAD or width % HEAD:
        raise ValueError(f"a width must be a multiple of {HEAD}, a head's width, not {width}")
    heads = width // HEAD
    layer = PreNorm(GQA(heads=heads, kv_heads=heads, head_width=HEAD), Dense(3 * width))
    return Run(
        name=f"transfer-{width}",
        model=ModelConfig(width=width, layers=2 * (layer,)),
        data=DataConfig(path="python:stdlib"),
        optim=OptimConfig(
            lr=RATES[0],
            # Decay goes with the rate, which would be one more thing that the rule changes.
            weight_decay=0.0,
            schedule=WSD(warmup="10%", decay="30%"),
            roles=default_roles(AdamW(), AdamW()),
        ),
        steps=300,
        batch=8,
        sequence_length=256,
        vocab=2048,
        precision="fp32",
    )


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is trained: every width at every rate, each with every seed. The rule starts at the
    first width."""

    widths: tuple[int, ...] = (128, 256, 512)
    rates: tuple[float, ...] = RATES
    seeds: int = 1
    modes: tuple[str, ...] = MODES

    def __post_init__(self) -> None:
        if len(set(self.widths)) < 2 or len(set(self.widths)) < len(self.widths):
            raise ValueError(f"widths must be two or more different ones, not {self.widths}")
        if len(self.rates) < 3 or list(self.rates) != sorted(set(self.rates)):
            raise ValueError(f"rates must be three or more, rising, not {self.rates}")
        if not 0 < self.rates[0] <= self.rates[-1] < math.inf:
            raise ValueError(f"rates must be above 0 and finite, not {self.rates}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, not {self.seeds}")
        if not self.modes or set(self.modes) - set(MODES):
            raise ValueError(f"modes are {' and '.join(MODES)}, not {', '.join(self.modes)}")


def transfer_experiment(
    sweep: Sweep,
    out: Path,
    *,
    recipe: Callable[[int], Run] = small,
    overrides: Sequence[str] = (),
    say: Say = print,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train what is not yet trained in `out`; `transfer.json`, `.html` and `.svg` there."""
    proxy, out = sweep.widths[0], out.absolute()
    bases = {width: override(recipe(width), overrides) for width in sweep.widths}
    for run in bases.values():
        if run.batch_ramp or run.stages:
            raise ValueError("transfer compares runs of one batch; leave out batch_ramp and stages")
    rule = [f"optim.transfer_from_width={proxy}"] if "on" in sweep.modes else []
    with_rule = {width: override(run, rule) for width, run in bases.items()}
    rows: list[dict[str, Any]] = []
    for mode in sweep.modes:
        for width in sweep.widths:
            # At the proxy's width the rule multiplies by 1.
            run = with_rule[width] if mode == "on" and width != proxy else bases[width]
            folder = out / (f"{mode}-{width}" if width != proxy else f"both-{width}")
            losses = [_losses(run, rate, sweep.seeds, folder, progress) for rate in sweep.rates]
            row = {"mode": mode, "width": width, **fitted(sweep.rates, losses)}
            rows.append(row)
            say(f"transfer {mode}, width {width}: {_says(row)}")
    result = _result(sweep, bases[proxy], rows)
    replace_file(out / "transfer.json", [json.dumps(result, indent=2).encode(), b"\n"])
    charts = _charts(result)
    write_charts(out / "transfer", "The best learning rate across widths", result["says"], charts)
    say(result["says"])
    return result


# --- runs -----------------------------------------------------------------------------------------


def _losses(
    base: Run, rate: float, seeds: int, folder: Path, progress: Progress | None
) -> list[float | None]:
    """The final training loss of every seed; None where it is not finite."""
    found: list[float | None] = []
    for seed in range(base.seed, base.seed + seeds):
        place = folder / f"lr-{rate:.4g}-seed-{seed}"
        run = dataclasses.replace(
            base,
            optim=dataclasses.replace(base.optim, lr=rate),
            seed=seed,
            # A rate so high that nothing is learnt is a result, not a failure.
            max_bad_steps=base.steps + 1,
            evaluation=UNJUDGED,
            log_every=1,
            checkpoint_every=base.steps,
            matmul_flops=base.matmul_flops or _ceiling(folder.parent),
        )
        train_in(run, place, progress)
        # A sweep is many runs: of those that are done only the curves are kept.
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
        (place / "report.html").unlink(missing_ok=True)
        found.append(final_loss([line["loss"] for line in read_metrics(place / "metrics.jsonl")]))
    return found


def _ceiling(out: Path) -> float | None:
    """What the first run of the sweep measured, so that the others need not."""
    records = (read_json(path) for path in sorted(out.glob("*/*/run.json")))
    return next((record["matmul_flops"] for record in records), None)


# --- figures --------------------------------------------------------------------------------------


def _result(sweep: Sweep, run: Run, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    factors: dict[str, Any] = {}
    for mode in sweep.modes:
        own = [row for row in rows if row["mode"] == mode]
        best = [row["best_rate"] for row in own]
        factors[mode] = {
            "factor": max(best) / min(best),
            "inside": all(row["inside"] for row in own),
        }
    return {
        "widths": list(sweep.widths),
        "proxy": sweep.widths[0],
        "seeds": sweep.seeds,
        "steps": run.steps,
        "tokens_per_step": run.tokens_per_step(),
        "rows": list(rows),
        "factors": factors,
        "says": "best rates of the widths differ by "
        + ", ".join(
            f"a factor {'' if each['inside'] else 'of at least '}{each['factor']:.2f} with "
            f"transfer {mode}"
            for mode, each in factors.items()
        ),
    }


def _says(row: dict[str, Any]) -> str:
    where = "" if row["inside"] else " (at an end of the rates trained: give further ones)"
    return f"best rate {row['best_rate']:.4g}, loss {row['best_loss']:.4f}{where}"


def _charts(result: dict[str, Any]) -> list[Chart]:
    """Loss over the rate, a line a width, the optima ringed; without the rule and with it."""
    shown = [loss for row in result["rows"] for loss in row["mean_losses"] if loss is not None]
    least = min(row["best_loss"] for row in result["rows"])
    worst_best = max(row["best_loss"] for row in result["rows"])
    charts: list[Chart] = []
    for mode in result["factors"]:
        lines: list[Line] = []
        for row in (row for row in result["rows"] if row["mode"] == mode):
            pairs = zip(row["rates"], row["mean_losses"], strict=True)
            kept = [(rate, loss) for rate, loss in pairs if loss is not None]
            xs, ys = zip(*kept, strict=True)
            mark = (row["best_rate"], row["best_loss"])
            lines.append(Line(f"width {row['width']}", xs, ys, (mark,)))
        apart = result["factors"][mode]["factor"]
        title = f"transfer {mode}: best rates a factor {apart:.2f} apart"
        high = min(max(shown), worst_best + max(0.5, 1.5 * (worst_best - least)))
        loss = "training loss, last tenth"
        charts.append(Chart(title, "learning rate", loss, tuple(lines), log_x=True, high=high))
    return charts
