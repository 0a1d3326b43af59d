"""Mixers and layers written out by their papers: fp64, one document, loops over heads and tokens.

They read the weights of the module under test and share no code with it.
"""

import math
from typing import Any

import torch
from torch import Tensor


def rms(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """RMSNorm."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def swiglu(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """W_down (silu(W_gate x) * W_up x)."""
    w_gate, w_up = w_gate_up.chunk(2)
    return (silu(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T


def turn(x_TR: Tensor, base: float | None) -> Tensor:
    """Rotary positions 0..T-1 of one head, pair by pair."""
    if base is None:
        return x_TR
    width = x_TR.shape[1]
    rows: list[Tensor] = []
    for t, x_R in enumerate(x_TR):
        turned: list[Tensor] = []
        for pair in range(width // 2):
            angle = t * base ** (-2 * pair / width)
            cos, sin = math.cos(angle), math.sin(angle)
            a, b = x_R[2 * pair], x_R[2 * pair + 1]
            turned += [a * cos - b * sin, a * sin + b * cos]
        rows.append(torch.stack(turned))
    return torch.stack(rows)


def attend(
    q_TK: Tensor,
    k_TK: Tensor,
    v_TV: Tensor,
    scale: float,
    window: int | None = None,
    sink: float = -math.inf,
) -> Tensor:
    """Causal attention of one head, token by token."""
    out: list[Tensor] = []
    for t in range(len(q_TK)):
        first = 0 if window is None else max(0, t - window + 1)
        power = (k_TK[first : t + 1] @ q_TK[t] * scale).exp()
        out.append(power @ v_TV[first : t + 1] / (power.sum() + math.exp(sink)))
    return torch.stack(out)


def gqa(module: Any, x_TD: Tensor, window: int | None = None) -> Tensor:
    """GQA and, with a window, SWA with its sinks."""
    own, kv, config = module.heads, module.kv, module.heads.config
    width = config.head_width
    heads: list[Tensor] = []
    for head in range(config.heads):
        shared = head // (config.heads // config.kv_heads)
        rows, kv_rows = (slice(i * width, (i + 1) * width) for i in (head, shared))
        q_TK, k_TK = x_TD @ own.w_q[rows].double().T, x_TD @ kv.w_k[kv_rows].double().T
        if config.qk_norm == "head":
            q_TK = rms(q_TK, own.q_norm.w_D.double(), own.q_norm.eps)
            k_TK = rms(k_TK, kv.k_norm.w_D.double(), kv.k_norm.eps)
        q_TK, k_TK = turn(q_TK, config.rope_base), turn(k_TK, config.rope_base)
        v_TK = x_TD @ kv.w_v[kv_rows].double().T
        sink = -math.inf
        if own.sink_H is not None:
            sink = float(own.sink_H[head])
        heads.append(attend(q_TK, k_TK, v_TK, width**-0.5, window, sink))
    return torch.cat(heads, dim=-1) @ own.w_o.double().T


def mla(module: Any, x_TD: Tensor) -> Tensor:
    """LongCat-Flash's order of operations: latent norms, scales, shared rotated key."""
    config, width = module.config, x_TD.shape[1]
    nope, rope, value = config.nope_width, config.rope_width, config.v_width
    scaled = config.scale_correction
    latent_T, q_rank = x_TD, config.q_rank
    if q_rank is not None:
        latent_T = x_TD @ module.queries.w_qa.double().T
        latent_T = rms(latent_T, module.queries.q_norm.w_D.double(), config.latent_eps)
    q_TX = (
        latent_T
        @ module.queries.w_qb.double().T
        * (width / q_rank if scaled and q_rank else 1.0) ** 0.5
    )
    down_TX = x_TD @ module.latents.w_kva.double().T
    c_TC = rms(down_TX[:, : config.kv_rank], module.latents.kv_norm.w_D.double(), config.latent_eps)
    c_TC = c_TC * (width / config.kv_rank if scaled else 1.0) ** 0.5
    k_TR = turn(down_TX[:, config.kv_rank :], config.rope_base)
    w_kvb = module.heads.w_kvb.double()
    heads: list[Tensor] = []
    for head in range(config.heads):
        q_TH = q_TX[:, head * (nope + rope) : (head + 1) * (nope + rope)]
        q_TH = torch.cat([q_TH[:, :nope], turn(q_TH[:, nope:], config.rope_base)], dim=1)
        up = w_kvb[head * (nope + value) : (head + 1) * (nope + value)]
        k_TH = torch.cat([c_TC @ up[:nope].T, k_TR], dim=1)
        heads.append(attend(q_TH, k_TH, c_TC @ up[nope:].T, (nope + rope) ** -0.5))
    return torch.cat(heads, dim=-1) @ module.heads.w_o.double().T
