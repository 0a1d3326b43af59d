"""Candidates for one op, timed in turns: forward and backward, each compared with the truth first.

A candidate that does not run here is a row that says why; one that errs gets its times, for whoever
mends it, but no ratio.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moebius.bench.agreement import TOLERANCE, error, leaf, values_and_gradients
from moebius.bench.memory import Memory
from moebius.bench.timing import interleaved
from moebius.train.precision import DTYPES

Op = Callable[..., Tensor]
PRECISIONS = ("bf16", "fp32", "fp64")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An op and its differentiable inputs. `same` is False for what computes something else."""

    op: Op
    inputs: Sequence[Tensor]
    same: bool = True
    notes: tuple[str, ...] = ()


def settings(
    device: str, precision: str, threads: int | None = None
) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of a benchmark of ops: auto, cpu or cuda; bf16, fp32 or fp64."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {device!r} is none of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda, but torch finds no CUDA device here; use cpu")
    found = torch.cuda.is_available() and device != "cpu"
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.device("cuda" if found else "cpu"), DTYPES[precision]


def numbers(text: str, count: int, what: str) -> tuple[int, ...]:
    """`4096x256x128` as numbers; ValueError where they are not so many, all above 0."""
    parts = text.split("x")
    if len(parts) != count or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"{text!r} is no shape; write {what}, {count} numbers joined by x")
    return tuple(int(part) for part in parts)


def compare(
    case: str,
    candidates: Mapping[str, Candidate],
    truth: str | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int,
    flops: float,
    repeats: int,
) -> list[dict[str, Any]]:
    """A row each, in their order; `truth` is the one the others have to equal."""
    right = None
    if truth is not None:
        right = values_and_gradients(candidates[truth].op, candidates[truth].inputs)
    rows: dict[str, dict[str, Any]] = {}
    works: dict[str, Callable[[], object]] = {}
    for name, one in candidates.items():
        row = rows[name] = {"name": name, "case": case, "agrees": None, "notes": [*one.notes]}
        try:
            found = values_and_gradients(one.op, one.inputs)
        except (ValueError, RuntimeError) as refused:
            row["notes"].append(f"does not run here: {str(refused).splitlines()[0]}")
            continue
        if right is not None and one.same:
            row["error"] = error(right, found)
            row["agrees"] = row["error"] <= TOLERANCE[dtype]
        work = works[name] = partial(_forward_backward, one.op, _leaves(one), found[0])
        del found
        row["peak_memory_bytes"] = _peak(work, device)
    for name, seconds in interleaved(works, device, repeats).items():
        more = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        rows[name] |= {**more, "gflops": flops / seconds / 1e9 if flops else None}
    return list(rows.values())


def ratios(rows: Sequence[dict[str, Any]], base: str, key: str, faster: bool = False) -> None:
    """Fill in the time over that of `base` (or how much faster it is) of each row that agrees."""
    bottom = next((row for row in rows if row["name"] == base), None)
    if bottom is None or "seconds" not in bottom or bottom["agrees"] is False:
        return
    for row in rows:
        if row is bottom or (row["agrees"] and "seconds" in row):
            ratio = row["seconds"] / bottom["seconds"]
            row[key] = 1 / ratio if faster else ratio


def _leaves(one: Candidate) -> list[Tensor]:
    return [leaf(x) for x in one.inputs]


def _forward_backward(op: Op, leaves: Sequence[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(op(*leaves), leaves, grad)


def _peak(work: Callable[[], object], device: torch.device) -> int | None:
    work()
    memory = Memory(device)
    memory.reset()
    work()
    return memory.peak()
