"""Products of quantised operands: y = Q(x) Q(w)^T; dx = Q(dy) Q(w); dw = Q(dy)^T Q(x).

Each product takes its scales anew along the dim it contracts. Elements times the scales of their
blocks are exact in bf16, so a bf16 product that accumulates in fp32 is the product of the formats;
scales of rows and matrices are applied to its result. Letters: N tokens, I inputs, O outputs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from moebius.ops.formats.format import Format
from moebius.ops.formats.plain import scale_plain
from moebius.ops.formats.quantise import BACKENDS as ROUNDINGS
from moebius.ops.formats.quantise import Quantised, quantise
from moebius.ops.formats.quantise import choose as rounding
from moebius.ops.formats.scaled import contract_scaled
from moebius.ops.formats.shares import Watch, show


@final
@dataclasses.dataclass(frozen=True)
class Product:
    """A format, and which products are in it; all others are in the activations' dtype.

    `backward`: `none` (forward alone), `input` (and dx), `both` (and dw). `stochastic` rounds
    gradients to either neighbour, by chance; it draws from torch's generator of the device.
    """

    format: Format
    backward: Literal["none", "input", "both"] = "both"
    stochastic: bool = False


Contract = Callable[[Quantised, Quantised], Tensor]


def contract_emulated(a: Quantised, b: Quantised) -> Tensor:
    """a b^T of operands [R, C] in their dtype, their contracted dims wherever they are."""
    x, y, dtype = a.rows(), b.rows().mT, a.blocks.dtype
    left, right = a.factor(), b.factor()
    if left is None or right is None:
        return x @ y
    # Scales meet the fp32 sum where the device hands it out; a CPU rounds it to bf16 before.
    if x.is_cuda and dtype not in (torch.float32, torch.float64):
        product = torch.mm(x, y, out_dtype=torch.float32)
        return scale_plain(product, left, right.mT).to(dtype)
    product = x @ y
    return ROUNDINGS[rounding(product, dtype)].scaled(product, left, right.mT)


BACKENDS: dict[str, Contract] = {"emulated": contract_emulated, "scaled": contract_scaled}


def choose(
    format: Format, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> str:
    """The backend of a product of N, I and O, by name: `scaled` is native fp8."""
    if device.type != "cuda" or dtype != torch.bfloat16 or not format.native:
        return "emulated"
    fits = all(size % 16 == 0 for size in shape)
    modern = torch.cuda.get_device_capability(device) >= (9, 0)
    return "scaled" if fits and modern else "emulated"


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, w_OI: Tensor, product: Product, watch: Watch | None
    ) -> Tensor:
        shape = (x_NI.shape[0], x_NI.shape[1], w_OI.shape[0])
        ctx.contract = BACKENDS[choose(product.format, x_NI.device, x_NI.dtype, shape)]
        ctx.product, ctx.watch = product, watch
        ctx.save_for_backward(x_NI, w_OI)
        x, w = (quantise(side, product.format, dtype=x_NI.dtype) for side in (x_NI, w_OI))
        show(watch, "x", x_NI, x, product.format.grid(gradient=False))
        show(watch, "w", w_OI, w, product.format.grid(gradient=False))
        return ctx.contract(x, w)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x_NI, w_OI = ctx.saved_tensors
        grad_NO: Tensor = grad_outputs[0]
        product, dtype = ctx.product, x_NI.dtype
        dx_NI = dw_OI = None
        if ctx.needs_input_grad[0] and product.backward != "none":
            dy = quantise_gradient(grad_NO, product, -1)
            show(ctx.watch, "dy", grad_NO, dy, product.format.grid(gradient=True))
            dx_NI = ctx.contract(dy, quantise(w_OI, product.format, -2, dtype=dtype))
        elif ctx.needs_input_grad[0]:
            dx_NI = grad_NO @ w_OI.to(dtype)
        if ctx.needs_input_grad[1] and product.backward == "both":
            dy = quantise_gradient(grad_NO, product, -2)
            x = quantise(x_NI, product.format, -2, dtype=dtype)
            dw_OI = ctx.contract(dy, x).to(w_OI.dtype)
        elif ctx.needs_input_grad[1]:
            dw_OI = (grad_NO.T @ x_NI).to(w_OI.dtype)
        return dx_NI, dw_OI, None, None


def multiply(x: Tensor, w_OI: Tensor, product: Product, watch: Watch | None = None) -> Tensor:
    """`x @ w_OI.T` as `product` says, in the dtype of x: [..., I] -> [..., O].

    Masters w_OI are quantised as they are, not by way of the dtype of x; `watch` is shown shares.
    """
    y_NO = _Multiply.apply(x.reshape(-1, x.shape[-1]), w_OI, product, watch)  # pyright: ignore
    return y_NO.view(*x.shape[:-1], w_OI.shape[0])


def quantise_gradient(
    grad: Tensor, product: Product, dim: int, segments: Sequence[int] | None = None
) -> Quantised:
    """The gradient of a result, in its dtype, as a backward product of `product` reads it."""
    return quantise(
        grad,
        product.format,
        dim,
        dtype=grad.dtype,
        gradient=True,
        stochastic=product.stochastic,
        segments=segments,
    )
