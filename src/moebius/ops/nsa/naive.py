"""The truth about NSA's selection: the printed sum, and an explicit softmax over chosen tokens.

The paper's sum is for blocks counted from 1; counted from 0 the blocks that overlap selection
block j are (width / stride) * j + m - n. Letters as in `blocks`.
"""

import torch
from torch import Tensor

from moebius.ops.attention import attention_naive


def importance_naive(
    p_BGTC: Tensor, block_BC: Tensor, num_blocks: int, block: int, stride: int, width: int
) -> Tensor:
    """See `moebius.ops.nsa.blocks.importance`."""
    parts: list[Tensor] = []
    for j in range(num_blocks):
        total_BGT = torch.zeros_like(p_BGTC[..., 0])
        for m in range(width // stride):
            for n in range(block // stride):
                same_BC = block_BC == width // stride * j + m - n
                total_BGT = total_BGT + (p_BGTC * same_BC[:, None, None]).sum(-1)
        parts.append(total_BGT)
    return torch.stack(parts, dim=-1)


def selected_naive(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    index_BGTX: Tensor,
    position_BS: Tensor,
    attend_BTS: Tensor,
    width: int,
    scale: float,
) -> Tensor:
    """See `moebius.ops.nsa.selected_attention`."""
    block_B11S1 = (position_BS // width)[:, None, None, :, None]
    chosen_BGTS = (index_BGTX[:, :, :, None] == block_B11S1).any(-1)
    outputs: list[Tensor] = []
    for g, q_BTQK in enumerate(q_BTHK.chunk(k_BSGK.shape[2], dim=2)):
        head = slice(g, g + 1)
        mask_BTS = chosen_BGTS[:, g] & attend_BTS
        outputs.append(
            attention_naive(q_BTQK, k_BSGK[:, :, head], v_BSGK[:, :, head], mask_BTS, scale)
        )
    return torch.cat(outputs, dim=2)
