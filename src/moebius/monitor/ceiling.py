"""The matmul ceiling: what this machine really does on plain matrix products.

MFU is stated against this, not against a data sheet. The shapes are fixed and named, so that
figures of different days compare.
"""

import time

import torch

# M, K, N of the products timed; the best rate counts.
SHAPES_CPU = ((4096, 512, 2048), (2048, 2048, 2048))
SHAPES_CUDA = ((8192, 8192, 8192), (16384, 4096, 4096))


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 7) -> float:
    """FLOP/s of the best of the fixed shapes, each the median of `repeats` products."""
    shapes = SHAPES_CUDA if device.type == "cuda" else SHAPES_CPU
    best = 0.0
    for m, k, n in shapes:
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(m, k, generator=generator).to(device, dtype)
        b = torch.randn(k, n, generator=generator).to(device, dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        seconds = sorted(_seconds(a, b, out) for _ in range(repeats + 2))
        best = max(best, 2.0 * m * k * n / seconds[len(seconds) // 2])
    return best


def _seconds(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    synchronise(a.device)
    start = time.perf_counter()
    torch.mm(a, b, out=out)
    synchronise(a.device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
