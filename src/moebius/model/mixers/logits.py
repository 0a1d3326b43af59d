"""The largest attention logit of each head, and the scaling of rows that pulls it down (QK-Clip).

After Kimi K2 (arXiv 2507.20534, 2.1), whose MuonClip scales the query and key weights of a head
whose largest logit passes a threshold. Letters as in `gqa`; L queries of a block, J query heads of
a key head, X rows of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moebius.ops.linear import at_least_fp32

# Multiplies a weight's rows, head by head, where they are held: see `scale_rows`.
ScaleRows = Callable[[Tensor | None, Tensor], None]
# Queries scored at once: the scores of all heads of so many rows are what memory holds.
BLOCK = 128


@torch.no_grad()
def max_logits(q_BTHK: Tensor, k_BSGK: Tensor, mask_BTS: Tensor, scale: float) -> Tensor:
    """The largest scale * q.k of each head over the pairs that the mask allows, max_H.

    Exact for these queries and keys, in fp32 at least; -inf for a head that sees nothing.
    """
    wide = at_least_fp32(q_BTHK.dtype)
    key_heads = k_BSGK.shape[2]
    k_BSGK = k_BSGK.to(wide)
    found: list[Tensor] = []
    for q_BLHK, mask_BLS in zip(q_BTHK.split(BLOCK, 1), mask_BTS.split(BLOCK, 1), strict=True):
        q_BLGJK = q_BLHK.to(wide).unflatten(2, (key_heads, -1))
        score_BGJLS = torch.einsum("blgjk,bsgk->bgjls", q_BLGJK, k_BSGK) * scale
        score_BGJLS.masked_fill_(~mask_BLS[:, None, None], float("-inf"))
        if score_BGJLS.shape[-1]:
            found.append(score_BGJLS.amax((0, 3, 4)).flatten())
    if not found:
        return q_BTHK.new_full((q_BTHK.shape[2],), float("-inf"), dtype=wide)
    return torch.stack(found).amax(0)


@torch.no_grad()
def scale_rows(weight: Tensor | None, factor_HX: Tensor) -> None:
    """Multiply a weight's rows, head by head, in place; `factor_HX` has a number a row or a head.

    The weight is [H * X, inputs], or a bias [H * X]; None is left out.
    """
    if weight is not None:
        heads = factor_HX.shape[0]
        rows_HXI = weight.view(heads, weight.shape[0] // heads, -1)
        rows_HXI.mul_(factor_HX.to(weight)[:, :, None])
