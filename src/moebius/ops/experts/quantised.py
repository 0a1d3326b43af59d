"""Experts in a low-precision format: sorted rows, each expert's segment a product of its own.

Scales are taken within a segment: of a row or of blocks of inputs in the forward and dx, of blocks
of the expert's own tokens in dw, the ragged last one filled with zeros. Letters: M rows sorted by
expert, P the same with segments filled up to whole blocks, I inputs, O outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moebius.config import spec_of
from moebius.ops.formats.format import Format
from moebius.ops.formats.product import Product, contract_emulated, quantise_gradient
from moebius.ops.formats.quantise import Quantised, choose, quantise
from moebius.ops.formats.shares import Watch, show
from moebius.ops.linear import Operand

# Rows quantised along a dim, in segments that are matrices of their own.
Quantise = Callable[[Tensor, int, list[int] | None], Quantised]


def product_of(*weights: Tensor) -> Product | None:
    """The product that the weights of experts carry, if they do."""
    found = [w.product if isinstance(w, Operand) else None for w in weights]
    if found.count(found[0]) < len(found):
        raise ValueError("both weights of experts must be multiplied in one format")
    return found[0]


def describe(product: Product, x: Tensor) -> str:
    """The path in use for such activations, its format, and what rounds to it, by name."""
    rounding = choose(x, x.dtype)
    return f"quantised ({spec_of(type(product.format), Format.TABLE)}, {rounding} rounding)"


def _split(q: Quantised, sizes: list[int]) -> list[Quantised]:
    """The parts of blocks that lie behind each other; `outer` has an entry a block (or none)."""
    outers: list[Tensor | None] = [None] * len(sizes)
    if q.outer is not None:
        # Along tokens a segment is a matrix: one scale, however many blocks.
        outers = [o if q.dim == -1 else o[:1] for o in q.outer.split(sizes)]
    parts = zip(q.blocks.split(sizes), q.scale.split(sizes), outers, strict=True)
    return [Quantised(*part, q.dim, q.length, q.by_row) for part in parts]


def _along_tokens(
    x_MI: Tensor, counts: list[int], block: int | None, to_format: Quantise
) -> list[Quantised]:
    """Each segment quantised along its own tokens."""
    if block is None:
        return [to_format(x, -2, None) for x in x_MI.split(counts)]
    sizes = [-(-count // block) for count in counts]
    x_PI = x_MI.new_zeros(sum(sizes) * block, x_MI.shape[1])
    filled = x_PI.split([size * block for size in sizes])
    for x, room in zip(x_MI.split(counts), filled, strict=True):
        room[: len(x)] = x
    return _split(to_format(x_PI, -2, sizes), sizes)


def _into(y_MO: Tensor, rows: Quantised, w_EOI: Quantised, counts: list[int]) -> Tensor:
    """Each segment of rows times its expert's matrix, written to y_MO."""
    segments = zip(_split(rows, counts), _matrices(w_EOI), y_MO.split(counts), strict=True)
    for x, w, y in segments:
        if len(y):
            y.copy_(contract_emulated(x, w))
    return y_MO


def _matrices(q: Quantised) -> list[Quantised]:
    outers = [None] * len(q.blocks) if q.outer is None else list(q.outer)
    parts = zip(q.blocks, q.scale, outers, strict=True)
    return [Quantised(*part, q.dim, q.length, q.by_row) for part in parts]


class _SegmentProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MI: Tensor, w_EOI: Tensor, counts: list[int], product: Product, watch: Any
    ) -> Tensor:
        ctx.save_for_backward(x_MI, w_EOI)
        ctx.counts, ctx.product, ctx.watch = counts, product, watch
        format, dtype = product.format, x_MI.dtype
        x = quantise(x_MI, format, dtype=dtype, segments=counts)
        w = quantise(w_EOI, format, dtype=dtype)
        show(watch, "x", x_MI, x, format.grid(gradient=False))
        show(watch, "w", w_EOI, w, format.grid(gradient=False))
        return _into(x_MI.new_empty(x_MI.shape[0], w_EOI.shape[1]), x, w, counts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x_MI, w_EOI = ctx.saved_tensors
        grad_MO, counts, product = grad_outputs[0], ctx.counts, ctx.product
        dx_MI, dw_EOI = torch.empty_like(x_MI), torch.zeros_like(w_EOI)
        if product.backward == "none":
            w_cast_EOI = w_EOI.to(x_MI.dtype)
            for dy, w, dx in zip(
                grad_MO.split(counts), w_cast_EOI, dx_MI.split(counts), strict=True
            ):
                torch.mm(dy, w, out=dx)
        else:
            dy = quantise_gradient(grad_MO, product, -1, counts)
            show(ctx.watch, "dy", grad_MO, dy, product.format.grid(gradient=True))
            w = quantise(w_EOI, product.format, -2, dtype=x_MI.dtype)
            _into(dx_MI, dy, w, counts)
        if product.backward == "both" and len(x_MI):
            _weight_gradient(dw_EOI, grad_MO, x_MI, counts, product)
        else:
            for dw, dy, x in zip(dw_EOI, grad_MO.split(counts), x_MI.split(counts), strict=True):
                dw.copy_(dy.T @ x)
        return dx_MI, dw_EOI, None, None, None


def _weight_gradient(
    dw_EOI: Tensor, grad_MO: Tensor, x_MI: Tensor, counts: list[int], product: Product
) -> None:
    def gradient(dy: Tensor, dim: int, segments: list[int] | None) -> Quantised:
        return quantise_gradient(dy, product, dim, segments)

    def input(x: Tensor, dim: int, segments: list[int] | None) -> Quantised:
        return quantise(x, product.format, dim, dtype=x.dtype, segments=segments)

    block = product.format.BLOCK
    grads = _along_tokens(grad_MO, counts, block, gradient)
    inputs = _along_tokens(x_MI, counts, block, input)
    for dw, dy, x, count in zip(dw_EOI, grads, inputs, counts, strict=True):
        if count:
            dw.copy_(contract_emulated(dy, x))


def _matmul(x_MI: Tensor, w_EOI: Tensor, counts: list[int]) -> Tensor:
    assert isinstance(w_EOI, Operand) and w_EOI.product is not None
    watch: Watch | None = w_EOI.watch()
    return _SegmentProducts.apply(x_MI, w_EOI, counts, w_EOI.product, watch)  # pyright: ignore


def _biased(y_MO: Tensor, b_EO: Tensor | None, expert_M: Tensor) -> Tensor:
    return y_MO if b_EO is None else y_MO + b_EO.to(y_MO.dtype).index_select(0, expert_M)


def experts_quantised(
    x_ND: Tensor,
    index_NS: Tensor,
    weight_NS: Tensor,
    w_gate_up_E2FD: Tensor,
    w_down_EDF: Tensor,
    b_gate_up_E2F: Tensor | None,
    b_down_ED: Tensor | None,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """See `moebius.ops.experts.experts`; both weights carry a product."""
    num_experts, num_selected = w_down_EDF.shape[0], index_NS.shape[1]
    flat = index_NS.flatten()
    counts = torch.bincount(flat, minlength=num_experts)[:num_experts].tolist()
    order_M = flat.argsort(stable=True)[: sum(counts)]
    token_M, expert_M = order_M // num_selected, flat[order_M]
    gate_up_MX = _matmul(x_ND.index_select(0, token_M), w_gate_up_E2FD, counts)
    hidden_MF = activation(_biased(gate_up_MX, b_gate_up_E2F, expert_M))
    out_MD = _biased(_matmul(hidden_MF, w_down_EDF, counts), b_down_ED, expert_M)
    weight_M1 = weight_NS.flatten().index_select(0, order_M)[:, None]
    y_ND = torch.zeros(x_ND.shape, dtype=weight_NS.dtype, device=x_ND.device)
    return y_ND.index_add(0, token_M, out_MD * weight_M1).to(x_ND.dtype)
