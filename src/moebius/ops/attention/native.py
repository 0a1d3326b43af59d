"""Attention as one fused kernel for the CPU: FlashAttention-2 (Dao 2023), in `native.cpp`.

Forward keeps the output and each row's normaliser; backward computes the weights again, so nothing
grows with queries times keys but the mask itself. Tiles of the mask that nobody sees are skipped,
and those that everybody sees go without it. Letters as in `sdpa`.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebius.ops import native

SOURCE = Path(__file__).with_name("native.cpp")
TILE = 64


def attention_native(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    mask_BTS: Tensor,
    scale: float,
    sink_H: Tensor | None = None,
) -> Tensor:
    """See `moebius.ops.attention.attention`. Everything in bf16 but the mask and the sinks."""
    if any(x.dtype != torch.bfloat16 for x in (q_BTHK, k_BSGK, v_BSGV)):
        raise ValueError("native attention takes queries, keys and values in bf16")
    if scale <= 0:
        raise ValueError(f"native attention takes a positive scale, not {scale}")
    (batch, queries, heads, width), (_, keys, kv_heads, _) = q_BTHK.shape, v_BSGV.shape
    if k_BSGK.shape != (batch, keys, kv_heads, width) or heads % kv_heads or len(v_BSGV) != batch:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_BTHK, k_BSGK, v_BSGV))
        raise ValueError(f"queries, keys and values do not fit each other: {shapes}")
    mask_BTS = mask_BTS.expand(batch, queries, keys)
    return _Attention.apply(q_BTHK, k_BSGK, v_BSGV, mask_BTS, scale, sink_H)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGV: Tensor,
        mask_BTS: Tensor,
        scale: float,
        sink_H: Tensor | None,
    ) -> Tensor:
        q, k, v, mask = (_rows(x) for x in (q_BTHK, k_BSGK, v_BSGV, mask_BTS))
        sink = None if sink_H is None else sink_H.float().contiguous()
        (batch, queries, heads, _), keys = q.shape, k.shape[1]
        out_BTHV = q.new_empty(batch, queries, heads, v.shape[-1])
        lse_BHT = q.new_empty(batch, heads, queries, dtype=torch.float32)
        tiles = (batch, -(-queries // TILE), -(-keys // TILE))
        classes = q.new_empty(tiles, dtype=torch.uint8)
        native.library(SOURCE).attention_forward(
            _call(q, k, v, mask, q),
            *(_start(x) for x in (q, k, v, mask)),
            native.address(sink),
            ctypes.c_float(scale),
            *(native.address(x) for x in (out_BTHV, lse_BHT, classes)),
            native.threads(),
        )
        ctx.save_for_backward(q, k, v, mask, sink_H, out_BTHV, lse_BHT, classes)
        ctx.scale = scale
        return out_BTHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        q, k, v, mask, sink_H, out_BTHV, lse_BHT, classes = ctx.saved_tensors
        grad = _rows(grad_outputs[0])
        sink = dsink_BH = dsink_H = None
        if sink_H is not None:
            sink = sink_H.float().contiguous()
            dsink_BH = torch.empty(q.shape[0], q.shape[2], dtype=torch.float32)
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        native.library(SOURCE).attention_backward(
            _call(q, k, v, mask, grad),
            *(_start(x) for x in (q, k, v, mask)),
            native.address(sink),
            ctypes.c_float(ctx.scale),
            *(native.address(x) for x in (out_BTHV, lse_BHT, classes)),
            _start(grad),
            *(native.address(x) for x in (dq, dk, dv, dsink_BH)),
            native.threads(),
        )
        if sink_H is not None and dsink_BH is not None:
            dsink_H = dsink_BH.sum(0).to(sink_H.dtype)
        return dq, dk, dv, None, None, dsink_H


def _rows(x: Tensor) -> Tensor:
    """The same with a contiguous last dimension, which kernels ask for; a copy only if need be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _start(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dout: Tensor) -> ctypes.Array[Any]:
    """Sizes and strides, in the order of `Call`."""
    (batch, queries, heads, width), (_, keys, kv_heads, value_width) = q.shape, v.shape
    sizes = [batch, queries, keys, heads, kv_heads, width, value_width]
    strides = [step for x in (q, k, v, dout, mask) for step in x.stride()[:-1]]
    return (ctypes.c_int64 * (len(sizes) + len(strides)))(*sizes, *strides)
