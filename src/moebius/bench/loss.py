"""`moebius bench loss`: head and cross-entropy, forward and backward: each backend, and torch's.

The logits of a step are its largest tensor, so the peak of memory counts as much as the time.
Letters: N tokens, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.bench.compare import Candidate, compare, numbers, ratios, settings
from moebius.bench.timing import machine
from moebius.ops.linear import linear
from moebius.ops.loss import BACKENDS, head_cross_entropy

SHAPES = ("4096x256x8192", "4096x256x4096")
NAIVE, USED = "naive", "in use"


def bench_loss(
    shapes: Sequence[str] = SHAPES,
    *,
    device: str = "auto",
    precision: str = "bf16",
    threads: int | None = None,
    repeats: int = 10,
    matmul_flops: float | None = None,
) -> dict[str, Any]:
    """Time all shapes; a dict of machine facts and `rows`."""
    sizes = [numbers(text, 3, "NxDxV") for text in shapes]
    where, dtype = settings(device, precision, threads)
    rows: list[dict[str, Any]] = []
    for text, (N, D, V) in zip(shapes, sizes, strict=True):
        candidates = _candidates(N, D, V, where, dtype)
        work = {"tokens": N, "flops": 3.0 * 2.0 * N * D * V, "repeats": repeats}
        found = compare(text, candidates, NAIVE, where, dtype, **work)
        ratios(found, NAIVE, "over_naive", faster=True)
        rows += found
    return {**machine(where, dtype, matmul_flops), "notes": ["cases are NxDxV"], "rows": rows}


def _candidates(
    N: int, D: int, V: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Candidate]:
    generator = torch.Generator().manual_seed(0)
    h_ND = torch.randn(N, D, generator=generator).to(device, dtype)
    w_VD = (torch.randn(V, D, generator=generator) * D**-0.5).to(device)
    target_N = torch.randint(0, V, (N,), generator=generator).to(device)
    valid_N = torch.ones(N, dtype=torch.bool, device=device)
    inputs = (h_ND, w_VD)

    def torch_plain(h_ND: Tensor, w_VD: Tensor) -> Tensor:
        return F.cross_entropy(linear(h_ND, w_VD).float(), target_N, reduction="sum")

    def torch_fused(h_ND: Tensor, w_VD: Tensor) -> Tensor:
        w_VD = w_VD.to(h_ND.dtype)
        return F.linear_cross_entropy(h_ND, w_VD, target_N, reduction="sum")

    ours = {**BACKENDS, USED: head_cross_entropy}
    own = {
        name: Candidate(lambda h, w, op=op: op(h, w, target_N, valid_N), inputs)
        for name, op in ours.items()
    }
    fused = {}
    # Not in every torch that is supported.
    if "linear_cross_entropy" in dir(F):
        fused = {"torch linear_cross_entropy": Candidate(torch_fused, inputs)}
    return {**own, "torch cross_entropy": Candidate(torch_plain, inputs), **fused}
