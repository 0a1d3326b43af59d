"""`moebius bench step`: whole training steps on real text, beside the dense twin, in one run.

Steps of all models are interleaved and their medians taken; the router learns as in training.
Before any ratio is printed, the experts in use are compared, values and gradients, with the naive
loop on the model's own routing.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from moebius.data import Loader
from moebius.model.count import count
from moebius.model.ffn.moe import MoELayer, routers_of
from moebius.model.lm import LM
from moebius.monitor.ceiling import matmul_rate, synchronise
from moebius.ops.experts import BACKENDS, choose
from moebius.train.precision import DTYPES
from moebius.train.precision import choose as choose_precision
from moebius.train.run import Run
from moebius.train.session import check, device_of, open_data, trial
from moebius.train.state import TrainState, new_state
from moebius.train.step import context_of, train_step
from moebius.train.twin import dense_twin

WARM_UP = 3
# Relative error allowed between the naive loop and the fast path, norm-wise, by dtype.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}


def bench_step(
    run: Run, repeats: int = 10, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Any]:
    """Time a run and its dense twin; a dict of machine facts and `rows`."""
    check(run)
    device = device_of(run)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    _, loader = open_data(run, progress)
    runs = [run, dense_twin(run)]
    states = [new_state(one, device) for one in runs]
    precision, _ = choose_precision(run.precision, device, trial(run, states[0], loader, device))
    dtype = DTYPES[precision]
    agreement = max_error(states[0].model, loader, device, dtype)
    agrees = agreement is None or agreement <= TOLERANCE[dtype]
    seconds: list[list[float]] = [[] for _ in runs]
    peaks = [0 for _ in runs]
    for turn in range(WARM_UP + repeats):
        for i, (one, state) in enumerate(zip(runs, states, strict=True)):
            elapsed, peak = _timed_step(one, state, loader, device, dtype)
            peaks[i] = max(peaks[i], peak)
            if turn >= WARM_UP:
                seconds[i].append(elapsed)
    ceiling = run.matmul_flops or matmul_rate(device, dtype)
    rows = [
        _row(one, state, statistics.median(times), peak, ceiling, agrees)
        for one, state, times, peak in zip(runs, states, seconds, peaks, strict=True)
    ]
    for row in rows:
        row["step_over_twin"] = row["seconds"] / rows[-1]["seconds"] if agrees else None
    return {
        "device": _name(device),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "matmul_flops": ceiling,
        "experts": choose(device, dtype),
        "expert_error": agreement,
        "rows": rows,
    }


def _timed_step(
    run: Run, state: TrainState, loader: Loader, device: torch.device, dtype: torch.dtype
) -> tuple[float, int]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronise(device)
    start = time.perf_counter()
    train_step(run, state, loader.batch(state.step).to(device), dtype, None, False)
    synchronise(device)
    elapsed = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return elapsed, peak


def _row(
    run: Run, state: TrainState, seconds: float, peak: int, ceiling: float, agrees: bool
) -> dict[str, Any]:
    counts = count(state.model, run.sequence_length)
    speed = run.tokens_per_step() / seconds
    return {
        "name": run.name,
        "tokens_per_second": speed,
        "mfu": speed * counts.flops_train / ceiling,
        "seconds": seconds,
        "params_total": counts.total,
        "params_active_mean": counts.active_mean,
        # Of the device's allocator; the two models share one process on a CPU.
        "peak_memory_bytes": peak or None,
        "agrees": agrees,
    }


def max_error(model: LM, loader: Loader, device: torch.device, dtype: torch.dtype) -> float | None:
    """Largest relative error of the experts in use against the naive loop; None without a MoE."""
    batch = loader.batch(0).to(device)
    ctx = context_of(batch, 0)
    h_BTD = torch.nn.functional.rms_norm(model.embed(batch.tokens_BT, dtype), (model.config.width,))
    errors: list[float] = []
    for block in model.blocks():
        for moe in routers_of(block):
            pending = moe.begin(h_BTD.detach(), ctx)
            assert pending.index_NS is not None and pending.weight_NS is not None
            inputs = (h_BTD.flatten(0, 1), pending.index_NS, pending.weight_NS)
            names = ("naive", choose(device, dtype))
            truth, fast = (_values_and_gradients(moe, name, *inputs) for name in names)
            errors += [_relative(a, b) for a, b in zip(truth, fast, strict=True)]
    return max(errors, default=None)


def _values_and_gradients(
    moe: MoELayer,
    backend: str,
    x_ND: torch.Tensor,
    index_NS: torch.Tensor,
    weight_NS: torch.Tensor,
) -> list[torch.Tensor]:
    weights = (moe.w_gate_up_E2FD, moe.w_down_EDF, moe.b_gate_up_E2F, moe.b_down_ED)
    own = [None if x is None else _leaf(x) for x in weights]
    x_ND, weight_NS = _leaf(x_ND), _leaf(weight_NS)
    y_ND = BACKENDS[backend](x_ND, index_NS, weight_NS, *own, moe.activation)  # pyright: ignore
    generator = torch.Generator().manual_seed(0)
    grad_ND = torch.randn(y_ND.shape, generator=generator).to(y_ND.device, y_ND.dtype)
    leaves = [x_ND, weight_NS, *(x for x in own if x is not None)]
    return [y_ND.detach(), *torch.autograd.grad(y_ND, leaves, grad_ND)]


def _leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


def _relative(truth: torch.Tensor, other: torch.Tensor) -> float:
    return float((other.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
