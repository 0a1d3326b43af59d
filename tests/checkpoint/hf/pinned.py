"""bf16 where experts are chosen: a near-tie that falls the other way moves a token's logits by far
more than rounding does, so routes are pinned to those of fp32, in both models.

`gate` is how the peer's routers are named, whose output is (logits, weights, indices).
"""

import copy
import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moebius.model.ffn.moe import routers_of
from moebius.model.ffn.routers import Route
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import LM

from .parity import Twin, our_logits, rms


def gates(peer: Any, gate: str) -> list[Any]:
    return [module for name, module in peer.named_modules() if name.endswith(gate)]


def routes(peer: Any, gate: str, tokens_BT: Tensor) -> list[Tensor]:
    """The experts of each token, by layer: [B, T, S]."""
    found: list[Tensor] = []

    def note(module: Any, args: Any, out: Any) -> None:
        found.append(out[2].unflatten(0, tokens_BT.shape))

    handles = [module.register_forward_hook(note) for module in gates(peer, gate)]
    peer(tokens_BT)
    for handle in handles:
        handle.remove()
    return found


def our_routes(lm: LM, tokens_BT: Tensor) -> list[Tensor]:
    """The same of ours in bf16."""
    found: list[Tensor] = []

    def note(module: Any, args: Any, route: Route) -> None:
        found.append(route.index_NS.unflatten(0, tokens_BT.shape))

    lm = copy.deepcopy(lm)
    for block in lm.blocks():
        for moe in routers_of(block):
            moe.router.register_forward_hook(note)
    our_logits(lm, tokens_BT, torch.bfloat16)
    return found


def weights(logit_NE: Tensor, index_NS: Tensor, renormalise: bool) -> Tensor:
    if renormalise:
        return logit_NE.gather(-1, index_NS).float().softmax(-1)
    return logit_NE.float().softmax(-1).gather(-1, index_NS)


def pinned_peer(peer: Any, gate: str, index: list[Tensor], renormalise: bool) -> Any:
    """A copy whose routers choose the experts of `index`, from its first token on."""
    peer = copy.deepcopy(peer)
    for module, index_BTS in zip(gates(peer, gate), index, strict=True):

        def choose(index_BTS: Tensor, module: Any, args: Any, out: Any) -> Any:
            # A continued sequence gives the last tokens.
            length = out[2].shape[0] // len(index_BTS)
            start = module.seen if module.seen < index_BTS.shape[1] else 0
            module.seen = start + length
            index_NS = index_BTS[:, start : start + length].flatten(0, 1)
            return out[0], weights(out[0], index_NS, renormalise).to(out[1].dtype), index_NS

        module.seen = 0
        module.register_forward_hook(partial(choose, index_BTS))
    return peer


def pinned_lm(lm: LM, index: list[Tensor], renormalise: bool) -> LM:
    """A copy of ours that chooses the same."""
    lm = copy.deepcopy(lm)
    moes = [moe for block in lm.blocks() for moe in routers_of(block)]
    for moe, index_BTS in zip(moes, index, strict=True):

        def choose(index_BTS: Tensor, module: Any, args: Any, route: Route) -> Route:
            index_NS = index_BTS.flatten(0, 1)
            weight_NS = weights(route.logit_NE, index_NS, renormalise)
            return dataclasses.replace(route, index_NS=index_NS, weight_NS=weight_NS)

        moe.router.register_forward_hook(partial(choose, index_BTS))
    return lm


def in_halves(peer: Any, tokens_BT: Tensor) -> Tensor:
    """The peer's logits, the second half of each sequence from the cache of the first."""
    half = tokens_BT.shape[1] // 2
    first = peer(tokens_BT[:, :half], use_cache=True)
    second = peer(tokens_BT[:, half:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits, second.logits], dim=1)


def check_bf16_pinned(twin: Twin, gate: str, *, fused: bool = True) -> None:
    """With the routes of fp32, our bf16 is no farther from theirs than theirs is from itself in
    another order of sums, and no farther from fp32 than theirs. Without them some routes differ,
    and that is what moves two runs in bf16 farther apart. `fused`: the peer has fused attention.
    """
    tokens_BT = twin.tokens_BT
    moes = [moe for block in twin.lm.blocks() for moe in routers_of(block)]
    router = moes[0].config.router
    assert isinstance(router, Softmax)
    half = copy.deepcopy(twin.peer).bfloat16()
    with torch.no_grad():
        exact, index = twin.peer(tokens_BT).logits, routes(twin.peer, gate, tokens_BT)
        free = our_routes(twin.lm, tokens_BT)
        pairs = zip(routes(half, gate, tokens_BT), free, strict=True)
        flips = sum(int((x.sort().values != y.sort().values).any(-1).sum()) for x, y in pairs)
        apart = rms(our_logits(twin.lm, tokens_BT, torch.bfloat16) - half(tokens_BT).logits)
        peer = pinned_peer(half, gate, index, router.renormalise)
        theirs = peer(tokens_BT).logits
        peer.set_experts_implementation("eager")
        if fused:
            peer.set_attn_implementation("sdpa")
        other = in_halves(peer, tokens_BT)
        mine = our_logits(pinned_lm(twin.lm, index, router.renormalise), tokens_BT, torch.bfloat16)
    noise = max(rms(theirs - other), rms(theirs - exact))
    assert rms(mine - exact) < 1.2 * rms(theirs - exact)
    assert rms(mine - theirs) < 1.5 * noise
    assert flips > 0 and apart > rms(mine - theirs)
