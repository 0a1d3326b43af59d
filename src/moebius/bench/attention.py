"""`moebius bench attention`: attention in use, forward and backward, beside naive and torch.

torch's scaled_dot_product_attention with its causal flag is the fastest it offers; it knows nothing
of packed documents, so that beside packed ones it is a yardstick and no equal. Letters: B rows, T
tokens, H query heads, G key heads, K and V widths of keys and values.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.bench.compare import Candidate, compare, numbers, ratios, settings
from moebius.bench.timing import machine
from moebius.ops.attention import attention, attention_naive

# The attentions of bench-qwen3moe (and bench-llama), bench-longcat, and one longer.
SHAPES = ("8x512x4x2x64x64", "8x512x4x4x96x64", "2x2048x4x2x64x64")
# Longer sequences have no naive row: its scores would not fit.
NAIVE_TOKENS = 1024
NAIVE, USED, TORCH = "naive", "in use", "torch sdpa, causal"


def bench_attention(
    shapes: Sequence[str] = SHAPES,
    documents: Sequence[int] = (1, 4),
    *,
    device: str = "auto",
    precision: str = "bf16",
    threads: int | None = None,
    repeats: int = 10,
    matmul_flops: float | None = None,
) -> dict[str, Any]:
    """Time all shapes, each with rows packed of so many documents; machine facts and `rows`."""
    sizes = [numbers(text, 6, "BxTxHxGxKxV") for text in shapes]
    where, dtype = settings(device, precision, threads)
    rows: list[dict[str, Any]] = []
    for text, size in zip(shapes, sizes, strict=True):
        for count in documents:
            case = f"{text}, {count} document(s)"
            B, T, H, _, K, V = size
            flops = 3.0 * 2.0 * B * H * (K + V) * T * T / 2
            found = compare(
                case,
                _candidates(size, count, where, dtype),
                NAIVE if T <= NAIVE_TOKENS else TORCH if count == 1 else None,
                where,
                dtype,
                tokens=B * T,
                flops=flops,
                repeats=repeats,
            )
            ratios(found, NAIVE, "over_naive", faster=True)
            rows += found
    notes = [f"{USED}: the op of the house; rates count the causal half of one whole document"]
    return {**machine(where, dtype, matmul_flops), "notes": notes, "rows": rows}


def _candidates(
    size: Sequence[int], documents: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Candidate]:
    B, T, H, G, K, V = size
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(B, T, heads, width, generator=generator).to(device, dtype)
        for heads, width in ((H, K), (G, K), (G, V))
    ]
    document_T = torch.arange(T, device=device) * documents // T
    mask_TT = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    mask_TT &= document_T[:, None] == document_T[None, :]
    mask_BTS, scale = mask_TT.expand(B, T, T).contiguous(), K**-0.5

    def used(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask_BTS, scale, causal=True)

    def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_naive(q, k, v, mask_BTS, scale)

    note = () if documents == 1 else ("looks across documents",)
    causal = Candidate(partial(_sdpa, scale), inputs, same=documents == 1, notes=note)
    truth = {NAIVE: Candidate(naive, inputs)} if T <= NAIVE_TOKENS else {}
    return {**truth, USED: Candidate(used, inputs), TORCH: causal}


def _sdpa(scale: float, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)
