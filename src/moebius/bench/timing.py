"""What every benchmark shares: interleaved timing, medians, and the machine beside the figures.

Works are timed in turns, so that a machine that slows down slows all of them, and the first turns
are left out. MFU and rates are stated against plain products of fixed shapes, measured in the same
run.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Self, final

import torch

from moebius.monitor.ceiling import SHAPES_CPU, SHAPES_CUDA, matmul_rate, synchronise

WARM_UP = 3
# Dense bf16 of a data sheet, by a part of the device's name: H100 and H200 (SXM).
SHEET = {"H100": 989e12, "H200": 989e12}


@final
class Stopwatch(contextlib.ContextDecorator):
    """Seconds spent inside it, summed until `take`; a device's queue is not stopped for it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start: Any = None
        self._spans: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> Self:
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self._spans.append((self._start, self._now()))

    def take(self) -> float:
        """The seconds so far, and start anew; on a device, only after it was waited for."""
        spans, self._spans = self._spans, []
        if self._cuda:
            return sum(start.elapsed_time(end) for start, end in spans) / 1e3
        return sum(end - start for start, end in spans)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The seconds of one call, the device's queue included."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def interleaved(
    works: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    warm_up: int = 2,
) -> dict[str, float]:
    """The median seconds of each work, all called in turns `repeats` times after the warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(warm_up + repeats):
        for name, work in works.items():
            elapsed = seconds_of(work, device)
            if turn >= warm_up:
                seconds[name].append(elapsed)
    return {name: statistics.median(times) for name, times in seconds.items()}


def device_name(device: torch.device) -> str:
    """The name of a device, as a table's header says it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def machine(device: torch.device, dtype: torch.dtype, flops: float | None = None) -> dict[str, Any]:
    """The header of a result: device, threads, dtype, and the rate of plain products beside it.

    `flops` is a rate that is known already (a recipe's `matmul_flops`).
    """
    name = device_name(device)
    rate = flops or matmul_rate(device, dtype)
    shapes = SHAPES_CUDA if device.type == "cuda" else SHAPES_CPU
    sheet = next((peak for part, peak in SHEET.items() if part in name), None)
    return {
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "matmul_flops": rate,
        "matmul_shapes": "given" if flops else ", ".join("x".join(map(str, s)) for s in shapes),
        "sheet_flops": sheet if dtype == torch.bfloat16 else None,
    }


def header(facts: Mapping[str, Any]) -> str:
    """A result's machine in one line."""
    rate, sheet = facts["matmul_flops"], facts["sheet_flops"]
    beside = f" ({rate / sheet:.0%} of the data sheet's {sheet / 1e12:,.0f} T)" if sheet else ""
    return (
        f"{facts['device']}, {facts['dtype']}, {facts['threads']} threads; plain products "
        f"({facts['matmul_shapes']}) {rate / 1e9:,.0f} GFLOP/s{beside}"
    )
