"""The truth about Kimi Delta Attention: the recurrence, token by token, in at least fp32.

Kimi Linear (arXiv 2510.26692), section 3. Where there is one token it is also the fast form.
Letters: K width of keys, V width of values.
"""

import torch
from torch import Tensor

from moebius.ops.linear import at_least_fp32


def unit(x_BTHK: Tensor) -> Tensor:
    """Vectors of length 1, in at least fp32; the small number is that of the published kernels."""
    x_BTHK = x_BTHK.to(at_least_fp32(x_BTHK.dtype))
    return x_BTHK * (x_BTHK.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def kda_naive(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None = None,
    first_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `moebius.ops.kda.kda` and `kda_onward`."""
    narrow, wide = q_BTHK.dtype, at_least_fp32(q_BTHK.dtype)
    q_BTHK, k_BTHK = unit(q_BTHK) * q_BTHK.shape[-1] ** -0.5, unit(k_BTHK)
    v_BTHV = v_BTHV.to(wide)
    keep_BTHK, beta_BTH = g_BTHK.to(wide).exp(), beta_BTH.to(wide)
    if first_BT is not None:
        keep_BTHK = keep_BTHK * ~first_BT[..., None, None]
    if state_BHKV is None:
        state_BHKV = v_BTHV.new_zeros(*k_BTHK[:, 0].shape, v_BTHV.shape[-1])
    outs: list[Tensor] = []
    deltas: list[Tensor] = []
    steps = zip(*(x.unbind(1) for x in (q_BTHK, k_BTHK, v_BTHV, keep_BTHK, beta_BTH)), strict=True)
    for q_BHK, k_BHK, v_BHV, keep_BHK, beta_BH in steps:
        decayed_BHKV = keep_BHK[..., None] * state_BHKV
        recalled_BHV = (k_BHK[..., None, :] @ decayed_BHKV)[..., 0, :]
        delta_BHV = beta_BH[..., None] * (v_BHV - recalled_BHV)
        state_BHKV = decayed_BHKV + k_BHK[..., None] * delta_BHV[..., None, :]
        outs.append((q_BHK[..., None, :] @ state_BHKV)[..., 0, :])
        deltas.append(delta_BHV)
    return torch.stack(outs, dim=1).to(narrow), torch.stack(deltas, dim=1)
