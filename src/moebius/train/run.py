"""A run: the frozen config of one experiment, and how a run folder keeps it.

Fields made with `runtime` are free to change at resume; the others identify the experiment. A
user's own `.py` parts are copied into the folder under their content hash, and named relative to
it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from moebius.config import (
    differences,
    from_json,
    identity,
    kept_file,
    map_user_files,
    runtime,
    to_json,
)
from moebius.data.config import DataConfig
from moebius.model.lm import ModelConfig
from moebius.model.weight import check_products
from moebius.monitor.alarms import AlarmConfig
from moebius.monitor.sinks import SinkConfig
from moebius.ops.formats import Product
from moebius.optim.optimizer import OptimConfig
from moebius.parallel.config import Parallel
from moebius.train.qk_clip import QKClip
from moebius.train.stages import Stage, check_rising

Precision = Literal["auto", "bf16", "fp32", "fp64", "fp8", "mxfp8", "mxfp4", "nvfp4"]


@dataclasses.dataclass(frozen=True)
class Run:
    """One experiment. `steps` is the schedule's horizon; `stop_at` may end the run before it."""

    name: str
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    steps: int
    # Sequences a step, and the later steps from which that changes.
    batch: int = 8
    batch_ramp: tuple[tuple[int, int], ...] = ()
    sequence_length: int = 512
    # Shares of the data's sources, one each, 0 for none; empty: the sources' own weights.
    weights: tuple[float, ...] = ()
    # Later stages: longer sequences, another batch, another rotary base, other weights.
    stages: tuple[Stage, ...] = ()
    vocab: int = 4096
    seed: int = 0
    # The dtype of activations; a lower format is that of the products of matrices and experts,
    # forward and backward, among activations in bf16.
    precision: Precision = "auto"
    # The products of a role's weights in detail; none: in the dtype of the activations.
    products: Mapping[str, Product | None] = dataclasses.field(default_factory=dict)
    # A run stops, its state saved, after this many skipped (non-finite) updates in a row.
    max_bad_steps: int = 5
    # Scale down the heads whose attention logits outgrow a threshold; none: leave them.
    qk_clip: QKClip | None = None

    stop_at: int | None = runtime(None)
    log_every: int = runtime(1)
    # Update-to-weight ratios cost a copy of the weights, so they have a pace of their own.
    measure_every: int = runtime(20)
    checkpoint_every: int = runtime(200)
    keep_checkpoints: int = runtime(2)
    # Write checkpoints while the run goes on, from a copy that takes as much memory of the host.
    save_in_background: bool = runtime(True)
    # At most so many sequences of `sequence_length` at once; in a stage as many as hold as much.
    micro_batch: int | None = runtime(None)
    recompute: bool = runtime(False)
    # How the processes of a launch share the work; one process needs none of it.
    parallel: Parallel = runtime(Parallel())
    threads: int | None = runtime(None)
    device: Literal["auto", "cpu", "cuda"] = runtime("auto")
    # FLOP/s that MFU is stated against; measured at the start if none is given.
    matmul_flops: float | None = runtime(None)
    alarms: AlarmConfig = runtime(AlarmConfig())
    sinks: tuple[SinkConfig, ...] = runtime(())
    # `module:function` called at the end with the trained model; it fills the summary.
    evaluation: str = runtime("moebius.eval.final:evaluate")

    def __post_init__(self) -> None:
        positive = ("steps", "batch", "sequence_length", "vocab", "max_bad_steps", "log_every")
        for name in (*positive, "measure_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("stop_at", "micro_batch", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 (or none)")
        starts = [step for step, _ in self.batch_ramp]
        if starts != sorted({step for step in starts if step >= 1}):
            raise ValueError(f"the steps of batch_ramp must rise from 1 on, not {starts}")
        if any(size < 1 for _, size in self.batch_ramp):
            raise ValueError("every batch of batch_ramp must be at least 1")
        check_rising(self.stages)
        check_products(self.products)
        if self.matmul_flops is not None and self.matmul_flops <= 0:
            raise ValueError(f"matmul_flops must be above 0 (or none), not {self.matmul_flops}")

    @property
    def last_step(self) -> int:
        """How many steps this process is to have done when it ends."""
        return self.steps if self.stop_at is None else min(self.stop_at, self.steps)

    def tokens_per_step(self) -> int:
        """Tokens of a step at the run's base batch and length, the unit of token durations."""
        return self.batch * self.sequence_length


# A run's tokenizer, in its folder.
TOKENIZER = "tokenizer.json"
# Run-time fields that change the order of floating-point sums.
INEXACT = ("micro_batch", "recompute", "threads", "device", "parallel")


def to_folder_json(run: Run, keep: Callable[[Path], str]) -> dict[str, Any]:
    """The JSON of a run whose user files were handed to `keep`, which says their new place.

    A tokenizer of the user's is the folder's `tokenizer.json` from now on.
    """
    data = map_user_files(to_json(run), lambda file: keep(Path(file)))
    if run.data.tokenizer is not None:
        data["data"]["tokenizer"] = TOKENIZER
    return data


def from_folder_json(data: Any, folder: Path) -> Run:
    """The run of a folder, its user files found inside it, unchanged."""
    run = from_json(Run, map_user_files(data, lambda file: kept_file(folder / file)))
    if run.data.tokenizer is None:
        return run
    own = dataclasses.replace(run.data, tokenizer=str(folder / TOKENIZER))
    return dataclasses.replace(run, data=own)


def check_same_experiment(old: Run, new: Run) -> None:
    """ValueError naming every identifying field that differs, with both values."""
    changed = differences(identity(old), identity(new))
    if changed:
        longer = "; steps may rise together with a further stage" if old.steps < new.steps else ""
        raise ValueError(
            f"this run cannot change {'; '.join(changed)}: these fields identify the experiment; "
            f"start a new run, or leave them as they are{longer}"
        )


def inexact_changes(old: Run, new: Run) -> list[str]:
    """Changed run-time fields with which a resumed run is no longer equal to the last bit."""
    pairs = ((name, getattr(old, name), getattr(new, name)) for name in INEXACT)
    return [f"{name}: {before} -> {after}" for name, before, after in pairs if before != after]
