"""Does growing pay? 2n layers from scratch against n layers stacked to 2n, at equal FLOPs.

After LongCat-Flash 3.1.2 (its fig. 5b, without a number). The grown arm trains n layers for a third
of its steps, is stacked, and trains on; the other arm takes as many steps of 2n layers as cost the
same training FLOPs. Both have the same data, batch and peak rate, and a schedule over their own
steps. Arms of one seed share the order of the data, so differences are paired.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moebius.checkpoint.files import replace_file
from moebius.data.config import DataConfig
from moebius.lab.grow import grow
from moebius.lab.interval import interval
from moebius.lab.stack import stacked
from moebius.lab.trained import check_unbegun, train_in
from moebius.model.block.prenorm import PreNorm
from moebius.model.count import Counts, count_config
from moebius.model.ffn.dense import Dense
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.monitor.runs import read_json
from moebius.optim.optimizer import OptimConfig
from moebius.optim.roles import default_roles
from moebius.optim.schedules.wsd import WSD
from moebius.train.run import Run
from moebius.train.session import Progress, Say

TIMES = 2


def small() -> Run:
    """Two Llama-like layers of width 128 on Python's library: the small arm of the experiment."""
    layer = PreNorm(GQA(heads=4, kv_heads=2, head_width=32), Dense(384))
    return Run(
        name="growth",
        model=ModelConfig(width=128, layers=2 * (layer,)),
        data=DataConfig(path="python:stdlib"),
        optim=OptimConfig(
            lr=0.005, schedule=WSD(warmup="5%", decay="30%"), roles=default_roles(), clip=1.0
        ),
        steps=600,
        batch=8,
        sequence_length=256,
        vocab=1024,
        precision="fp32",
    )


@dataclasses.dataclass(frozen=True)
class Arms:
    """The steps of both arms, and the two models' counts. An arm's FLOPs are of its training."""

    steps: int
    grow_at: int
    scratch_steps: int
    small: Counts
    large: Counts
    tokens_per_step: int

    @property
    def grown_arm_flops(self) -> float:
        """Of all tokens of the grown arm, those before the growth at the small model's cost."""
        after = self.steps - self.grow_at
        steps_flops = self.grow_at * self.small.flops_train + after * self.large.flops_train
        return steps_flops * self.tokens_per_step

    @property
    def scratch_arm_flops(self) -> float:
        """Of all tokens of the arm from scratch; equal but for the rounding to whole steps."""
        return self.scratch_steps * self.large.flops_train * self.tokens_per_step


def arms_of(run: Run) -> Arms:
    """The arms of a small model whose `steps` are those of the grown arm in all."""
    if run.batch_ramp or run.stages:
        raise ValueError("growth compares steps of one cost; leave out batch_ramp and stages")
    if run.steps < 3:
        raise ValueError(f"steps ({run.steps}) must be at least 3 to grow at a third of them")
    small, large = (
        count_config(model, run.vocab, run.sequence_length)
        for model in (run.model, stacked(run.model, TIMES))
    )
    grow_at = round(run.steps / 3)
    scratch = round(grow_at * small.flops_train / large.flops_train + run.steps - grow_at)
    return Arms(run.steps, grow_at, scratch, small, large, run.tokens_per_step())


def growth_experiment(
    run: Run, out: Path, *, seeds: int = 3, say: Say = print, progress: Progress | None = None
) -> dict[str, Any]:
    """Train both arms of every seed in `out`, or go on where that was stopped; `growth.json`.

    `run` is the small model, its `steps` those of the grown arm before and after its growth.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, not {seeds}")
    arms = arms_of(run)
    say(
        f"{arms.scratch_steps} steps from scratch, or {arms.grow_at} small and "
        f"{arms.steps - arms.grow_at} grown ones: {arms.scratch_arm_flops:.3e} and "
        f"{arms.grown_arm_flops:.3e} FLOPs"
    )
    rows = []
    for seed in range(run.seed, run.seed + seeds):
        seeded = dataclasses.replace(run, seed=seed, stop_at=None)
        row = _seed(seeded, arms, out.absolute() / f"seed-{seed}", say, progress)
        rows.append(row)
        say(
            f"seed {seed}: held-out loss {row['scratch']['val_loss']:.4f} from scratch, "
            f"{row['grown']['val_loss']:.4f} grown"
        )
    result = _result(run, arms, rows)
    text = json.dumps(result, indent=2) + "\n"
    replace_file(out.absolute() / "growth.json", [text.encode()])
    say(f"grown minus scratch: {result['difference']['says']}")
    return result


# --- arms -----------------------------------------------------------------------------------------


def _seed(
    run: Run, arms: Arms, folder: Path, say: Say, progress: Progress | None
) -> dict[str, Any]:
    large = stacked(run.model, TIMES)
    scratch = dataclasses.replace(
        run, name=f"{run.name}-scratch", model=large, steps=arms.scratch_steps
    )
    small = dataclasses.replace(run, stop_at=arms.grow_at)
    grown = dataclasses.replace(run, name=f"{run.name}-grown", model=large)
    paths = {name: folder / name for name in ("scratch", "small", "grown")}
    train_in(scratch, paths["scratch"], progress)
    if check_unbegun(grown, paths["grown"]):
        train_in(small, paths["small"], progress)
        grow(paths["small"], paths["grown"], layers=TIMES, say=say, progress=progress)
    train_in(grown, paths["grown"], progress)
    record = read_json(paths["grown"] / "run.json")["grown"]
    first = {name: record[name] for name in ("step", "parent_loss", "first_loss")}
    found = {name: _figures(paths[name]) for name in ("scratch", "grown")}
    found["scratch"] |= {"flops": arms.scratch_arm_flops}
    found["grown"] |= {"flops": arms.grown_arm_flops, **first}
    difference = found["grown"]["val_loss"] - found["scratch"]["val_loss"]
    return {"seed": run.seed, **found, "difference": difference}


def _figures(folder: Path) -> dict[str, Any]:
    """What the evaluation at the end of a run found."""
    summary = read_json(folder / "summary.json")
    names = ("steps", "tokens", "val_loss", "val_bits_per_byte")
    missing = [name for name in names if name not in summary]
    if missing:
        raise ValueError(
            f"the evaluation of {folder} gave no {', '.join(missing)}; leave the run's own in place"
        )
    return {name: summary[name] for name in names}


# --- figures --------------------------------------------------------------------------------------


def _result(run: Run, arms: Arms, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "run": run.name,
        "layers": [len(run.model.layers), TIMES * len(run.model.layers)],
        "params_total": [arms.small.total, arms.large.total],
        "flops_per_token": [arms.small.flops_train, arms.large.flops_train],
        "scratch_steps": arms.scratch_steps,
        "grown_steps": [arms.grow_at, arms.steps - arms.grow_at],
        "flops": {"scratch": arms.scratch_arm_flops, "grown": arms.grown_arm_flops},
        # What rounding to whole steps leaves: positive where the grown arm spent more.
        "flops_mismatch": arms.grown_arm_flops / arms.scratch_arm_flops - 1.0,
        "seeds": list(rows),
        "difference": paired([row["difference"] for row in rows]),
    }


def paired(differences: Sequence[float], name: str = "grown") -> dict[str, Any]:
    """Mean of paired differences and its 95% confidence interval (Student's t; None for one).

    `name` is what stands before the minus, for the sentence that says it.
    """
    mean, low, high = interval(differences)
    says = "undecided"
    if low is not None and high is not None and not low <= 0 <= high:
        says = f"{name} is {'lower' if mean < 0 else 'higher'}"
    span = "" if low is None else f", 95% interval {low:+.4f} to {high:+.4f}"
    return {
        "mean": mean,
        "ci95": None if low is None else [low, high],
        "pairs": len(differences),
        "says": f"{mean:+.4f} nats a token{span}: {says}",
    }
