"""Native fp8 with scales a row: torch's scaled product, on CUDA from compute capability 9 on."""

import torch
from torch import Tensor

from moebius.ops.formats.quantise import Quantised


def contract_scaled(a: Quantised, b: Quantised) -> Tensor:
    """a b^T of row-wise e4m3 operands in bf16; every size must be a multiple of 16."""
    left, right = a.factor(), b.factor()
    assert left is not None and right is not None
    eight = torch.float8_e4m3fn
    x, y = a.rows().to(eight), b.rows().to(eight)
    scale_a, scale_b = left.contiguous(), right.mT.contiguous()
    x, y, dtype = x.contiguous(), y.contiguous().mT, a.blocks.dtype
    return torch.ops.aten._scaled_mm(x, y, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype)
