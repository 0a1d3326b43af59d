"""What tokens leave of a state of Kimi Delta Attention, once it is known what each of them writes.

For a decode state that moves on in strides, and for pieces of sequences that ranks share. Letters:
K width of keys, V width of values.
"""

import torch
from torch import Tensor

from moebius.ops.kda.naive import unit


def absorb(state_BHKV: Tensor, k_BTHK: Tensor, delta_BTHV: Tensor, g_BTHK: Tensor) -> Tensor:
    """The state after tokens, from what they wrote: no recurrence, no query."""
    if not k_BTHK.shape[1]:
        return state_BHKV
    # The decay after each token: 1 after the last, so the sum runs from the end.
    total_BTHK = g_BTHK.flip(1).cumsum(1).flip(1)
    after_BTHK = torch.cat([total_BTHK[:, 1:], torch.zeros_like(total_BTHK[:, :1])], dim=1)
    key_BTHK = unit(k_BTHK) * after_BTHK.exp()
    written_BHKV = torch.einsum("bthk,bthv->bhkv", key_BTHK, delta_BTHV)
    return total_BTHK[:, 0].exp()[..., None] * state_BHKV + written_BHKV
