"""Attention to chosen blocks by the Triton kernel of flash-linear-attention (PyPI fla-core), CUDA.

The kernel takes our choice of blocks, so compression, keys per branch and rotation are free.
Letters as in `blocks`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def kernel_fits(dtype: torch.dtype, group: int, head_width: int, width: int) -> bool:
    """Whether the kernel takes H / G = group and blocks of `width`; in fp32 it would use TF32."""
    powers = group & (group - 1) == 0 and width & (width - 1) == 0
    sizes = group >= 16 and width >= 16 and head_width <= 256
    return powers and sizes and dtype in (torch.bfloat16, torch.float16)


def selected_fla(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    index_BGTX: Tensor,
    position_BS: Tensor,
    attend_BTS: Tensor,
    width: int,
    scale: float,
) -> Tensor:
    """See `moebius.ops.nsa.selected_attention`; documents begin where the position is 0."""
    from fla.ops.nsa import parallel_nsa  # pyright: ignore[reportMissingImports]

    num_tokens = position_BS.numel()
    start_D = (position_BS.flatten() == 0).nonzero()[:, 0]
    ends_D = F.pad(start_D, (0, 1), value=num_tokens).to(torch.int32)
    # The kernel wants a power of 2 of blocks; it skips -1.
    spare = (1 << (index_BGTX.shape[-1] - 1).bit_length()) - index_BGTX.shape[-1]
    index_BTGX = F.pad(index_BGTX, (0, spare), value=-1).transpose(1, 2)
    out_1NHK = parallel_nsa(
        q_BTHK.flatten(0, 1)[None],
        k_BSGK.flatten(0, 1)[None],
        v_BSGK.flatten(0, 1)[None],
        block_indices=index_BTGX.flatten(0, 1)[None].to(torch.int32),
        block_counts=index_BTGX.shape[-1],
        block_size=width,
        scale=scale,
        cu_seqlens=ends_D,
    )
    return out_1NHK[0].unflatten(0, q_BTHK.shape[:2])
