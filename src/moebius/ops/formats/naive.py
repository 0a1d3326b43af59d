"""The truth about products in a format: blocks one by one, elements by search, sums in fp64."""

import torch
from torch import Tensor

from moebius.ops.formats.format import Format
from moebius.ops.formats.product import Product


def nearest_naive(x: Tensor, table: Tensor) -> Tensor:
    """The entry of a rising table that is nearest to |x|, signed as x; ties to even places."""
    size = x.abs()
    high = torch.searchsorted(table.to(x.dtype), size).clamp(max=len(table) - 1)
    low = (high - 1).clamp(min=0)
    up, down = table[high] - size, size - table[low]
    chosen = torch.where((up < down) | ((up == down) & (high % 2 == 0)), high, low)
    return table[chosen].to(x.dtype).copysign(x)


def quantise_naive(x_RC: Tensor, format: Format, gradient: bool = False) -> Tensor:
    """What x_RC stands for once quantised along its last dim."""
    grid, out = format.grid(gradient), torch.zeros_like(x_RC, dtype=torch.float64)
    size = format.BLOCK or x_RC.shape[1]
    matrix_amax = x_RC.abs().amax().float()
    for r in range(x_RC.shape[0]):
        for start in range(0, x_RC.shape[1], size):
            block = x_RC[r, start : start + size]
            scale, outer = format.scales(block.abs().amax().float(), matrix_amax, grid)
            total = scale if outer is None else scale * outer
            if total > 0:
                block = nearest_naive(block.to(total.dtype) / total, grid.values())
                factor = scale.double() * (1.0 if outer is None else outer.double())
                out[r, start : start + size] = block.double() * factor
    return out


def product_naive(
    x_NI: Tensor, w_OI: Tensor, grad_NO: Tensor, product: Product
) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dw in fp64, gradients rounded to nearest."""
    format, backward = product.format, product.backward
    y_NO = quantise_naive(x_NI, format) @ quantise_naive(w_OI, format).T
    dx_NI, dw_OI = grad_NO.double() @ w_OI.double(), grad_NO.double().T @ x_NI.double()
    if backward != "none":
        dx_NI = quantise_naive(grad_NO, format, True) @ quantise_naive(w_OI.T, format).T
    if backward == "both":
        dw_OI = quantise_naive(grad_NO.T, format, True) @ quantise_naive(x_NI.T, format).T
    return y_NO, dx_NI, dw_OI
