"""The op of Kimi Delta Attention: a delta rule whose state decays by channel (Kimi Linear, 2025).

`naive` is the recurrence, the truth in any precision; `chunk` the same in matrix products, for any
device; `fla` the Triton kernels of the optional package fla-core, for CUDA; `shared` for sequences
that ranks share. Letters: K width of keys, V width of values.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from moebius.ops.kda.absorb import absorb
from moebius.ops.kda.chunk import kda_chunk
from moebius.ops.kda.fla import MAX_WIDTH, kda_fla
from moebius.ops.kda.naive import kda_naive
from moebius.ops.kda.shared import kda_shared
from moebius.ops.ranks import Group

__all__ = ["BACKENDS", "KDAOp", "absorb", "choose", "kda", "kda_onward"]

KDAOp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

BACKENDS: dict[str, KDAOp] = {
    "naive": lambda q, k, v, g, beta, first: kda_naive(q, k, v, g, beta, None, first)[0],
    "chunk": lambda q, k, v, g, beta, first: kda_chunk(q, k, v, g, beta, None, first)[0],
    "fla": kda_fla,
}


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("fla") is not None


def choose(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """The backend in use for whole sequences of heads this wide, by name."""
    # In fp32 the kernels' products may be of TF32, which is not what fp32 was asked for.
    half = dtype in (torch.bfloat16, torch.float16)
    fits = device.type == "cuda" and half and width <= MAX_WIDTH
    return "fla" if fits and _installed() else "chunk"


def kda(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    beta_BTH: Tensor,
    first_BT: Tensor,
    group: Group = None,
) -> Tensor:
    """out_BTHV of whole sequences, in the dtype of q, by a state S_HKV that is empty at first:

        S <- diag(exp(g_t)) S;  S <- S + beta_t k_t (v_t - S^T k_t)^T;  out_t = S^T q_t

    q and k are brought to length 1 here, and q scaled by K^-0.5. g (the log of the decay, at most
    0) and beta are of at least fp32. A document begins where `first_BT` is True: S is empty again.
    Ranks of a `group` share the sequences, and give the pieces that they have (`in_pieces`).
    """
    if group is not None:
        return kda_shared(q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH, first_BT, group)
    op = BACKENDS[choose(q_BTHK.device, q_BTHK.dtype, k_BTHK.shape[-1])]
    return op(q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH, first_BT)


def kda_onward(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTHK: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same for tokens that continue a state: out_BTHV, and delta_BTHV for `absorb`.

    delta_t = beta_t (v_t - S^T k_t) is what token t writes at its key.
    """
    op = kda_naive if q_BTHK.shape[1] == 1 else kda_chunk
    return op(q_BTHK, k_BTHK, v_BTHV, g_BTHK, beta_BTH, state_BHKV, None)
