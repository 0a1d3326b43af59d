"""NSA against its equations, query by query; against a public package; its state and its config."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moebius.model.block.prenorm import PreNorm
from moebius.model.context import Context
from moebius.model.ffn.dense import Dense
from moebius.model.lm import ModelConfig
from moebius.model.mixers.cache import SLACK
from moebius.model.mixers.nsa import NSA
from moebius.model.part import Site
from moebius.model.weight import initialise, named_weights

from . import formulas
from .inputs import context, noise, tokens

WIDTH = 20
SITE = Site(WIDTH, num_writes=2, layer=0, eps=1e-5)
SMALL = NSA(4, 2, 6, block=4, stride=2, selected_block=8, num_selected=4, window=5)
Weights = dict[str, Tensor]


def built(config: NSA) -> Any:
    """The mixer with every weight of noise, gates and positions too."""
    mixer = config.build(SITE)
    initialise(mixer, 0)
    with torch.no_grad():
        for i, weight in enumerate(mixer.parameters()):
            weight += 0.3 * noise(*weight.shape, seed=i, dtype=weight.dtype)
    return mixer.double()


# --- the equations --------------------------------------------------------------------------------


def project(w: Tensor, x_TD: Tensor, part: int, width: int) -> Tensor:
    """Rows part * width and on of a weight, applied."""
    return x_TD @ w[part * width : (part + 1) * width].T


def compress(w: Weights, name: str, x_TK: Tensor, config: NSA) -> list[Tensor]:
    """phi of every block that is complete (eq. 7)."""
    made: list[Tensor] = []
    for first in range(0, len(x_TK) - config.block + 1, config.stride):
        block_IK = x_TK[first : first + config.block]
        if config.compression == "mean":
            made.append(block_IK.sum(0) / config.block)
            continue
        inputs = block_IK.reshape(-1) + w[f"{name}.position"]
        made.append(w[f"{name}.w_out"] @ formulas.silu(w[f"{name}.w_in"] @ inputs))
    return made


def softmax(q_K: Tensor, keys: list[Tensor]) -> Tensor:
    power = (torch.stack(keys) @ q_K / math.sqrt(len(q_K))).exp()
    return power / power.sum()


def look(q_K: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    return softmax(q_K, keys) @ torch.stack(values) if keys else 0.0 * q_K


def ranked(importance: list[float], own: int) -> list[int]:
    """Past blocks that nothing forces, the most important first."""
    return sorted(range(1, own - 1), key=lambda j: (-importance[j], -j))


def importance_of(p_C: list[float], own: int, config: NSA) -> list[float]:
    """Sum of p over the compressed blocks on each run of `stride` positions of a block (eq. 9)."""
    runs, reach = config.selected_block // config.stride, config.block // config.stride
    covering = [
        sum(p for i, p in enumerate(p_C) if i <= run < i + reach) for run in range((own + 1) * runs)
    ]
    return [sum(covering[j * runs : (j + 1) * runs]) for j in range(own + 1)]


def nsa(w: Weights, config: NSA, x_TD: Tensor) -> tuple[Tensor, list[list[list[float]]]]:
    """One document: outputs, and the importance of blocks by key head and query."""
    width, group = config.head_width, config.heads // config.kv_heads
    outputs: list[Tensor] = []
    seen: list[list[list[float]]] = []
    for g in range(config.kv_heads):
        part = [b * config.kv_heads + g for b in ((0, 1, 2) if config.separate_kv else (0, 0, 0))]
        k = [project(w["w_k"], x_TD, p, width) for p in part]
        v = [project(w["w_v"], x_TD, p, width) for p in part]
        k = [k[0], formulas.turn(k[1], config.rope_base), formulas.turn(k[2], config.rope_base)]
        block_k = compress(w, "phi_k", k[0], config)
        block_v = compress(w, "phi_v", v[0], config)
        heads = range(g * group, (g + 1) * group)
        q = [project(w["w_q"], x_TD, h, width) for h in heads]
        turned = [formulas.turn(q_TK, config.rope_base) for q_TK in q]
        rows: list[list[Tensor]] = [[] for _ in heads]
        seen.append([])
        for t in range(len(x_TD)):
            own = t // config.selected_block
            done = [i for i in range(len(block_k)) if i * config.stride + config.block - 1 <= t]
            keys, values = [block_k[i] for i in done], [block_v[i] for i in done]
            p_QC = [softmax(q_TK[t], keys).tolist() for q_TK in q] if done else []
            p_C = [math.fsum(p_Q) for p_Q in zip(*p_QC, strict=True)]
            seen[-1].append(importance_of(p_C, own, config))
            forced = {0, max(0, own - 1), own}
            free = ranked(seen[-1][t], own)[: config.num_selected - len(forced)]
            picked = [s for s in range(t + 1) if s // config.selected_block in forced | set(free)]
            near = range(max(0, t - config.window + 1), t + 1)
            for i, h in enumerate(heads):
                branches = [
                    look(q[i][t], keys, values),
                    look(turned[i][t], [k[1][s] for s in picked], [v[1][s] for s in picked]),
                    look(turned[i][t], [k[2][s] for s in near], [v[2][s] for s in near]),
                ]
                gates = [
                    1 / (1 + (-(w["w_gate"][b * config.heads + h] @ x_TD[t])).exp())
                    for b in range(3)
                ]
                gated = [a * b for a, b in zip(gates, branches, strict=True)]
                rows[i].append(torch.stack(gated).sum(0))
        outputs += [torch.stack(row) for row in rows]
    return torch.cat(outputs, dim=1) @ w["w_o"].T, seen


@pytest.mark.parametrize(
    ("config", "documents"),
    [
        (SMALL, (46,)),
        (dataclasses.replace(SMALL, heads=2, window=1), (2, 33, 3, 1)),
        (dataclasses.replace(SMALL, heads=6, selected_block=4, stride=4), (27, 9, 6)),
        (dataclasses.replace(SMALL, heads=8, kv_heads=1, compression="mean"), (45,)),
        (dataclasses.replace(SMALL, separate_kv=False, rope_base=None), (4, 42)),
        (dataclasses.replace(SMALL, block=6, selected_block=2, num_selected=5), (29,)),
        (dataclasses.replace(SMALL, separate_kv=False, compression="mean", window=99), (3, 38)),
        (SMALL, (3,)),
        (SMALL, (1, 1, 2)),
        (NSA(2, 1, 4), (40,)),
    ],
    ids=str,
)
def test_nsa_is_its_equations(config: NSA, documents: tuple[int, ...]) -> None:
    """Values, and the gradients of the input and every weight."""
    mixer, length = built(config), sum(documents)
    x_BTD = noise(1, length, WIDTH, seed=3).requires_grad_()
    twin = x_BTD.detach().clone().requires_grad_()
    w = {name: p.detach().clone().requires_grad_() for name, p in mixer.named_parameters()}
    got_TD = mixer(x_BTD, context(documents), None, {})[0][0]
    want_TD = torch.cat([nsa(w, config, part)[0] for part in twin[0].split(documents)])
    torch.testing.assert_close(got_TD, want_TD, rtol=1e-10, atol=1e-12)
    direction_TD = noise(length, WIDTH, seed=4)
    (got_TD * direction_TD).sum().backward()
    (want_TD * direction_TD).sum().backward()
    torch.testing.assert_close(x_BTD.grad, twin.grad, rtol=1e-9, atol=1e-11)
    for name, parameter in mixer.named_parameters():
        want = torch.zeros_like(w[name]) if w[name].grad is None else w[name].grad
        torch.testing.assert_close(parameter.grad, want, rtol=1e-9, atol=1e-11, msg=name)


def test_the_choice_matters_where_blocks_are_left_out() -> None:
    """So that the tests above mean something: with more blocks another output comes out."""
    few, all_of_them = built(SMALL), built(dataclasses.replace(SMALL, num_selected=6))
    x_BTD, ctx = noise(1, 46, WIDTH, seed=3), context((46,))
    moved_T = (few(x_BTD, ctx, None, {})[0] - all_of_them(x_BTD, ctx, None, {})[0])[0].norm(dim=-1)
    left_out = 4 * SMALL.selected_block  # up to here four blocks are all there are
    assert moved_T[:left_out].max() < 1e-12
    assert moved_T[left_out:].min() > 1e-3


# --- the public package ---------------------------------------------------------------------------


def peer_of(mixer: Any, num_selected: int) -> Any:
    """lucidrains' SparseAttention with our weights. Its memory key, which every query sees, is
    switched off by a coordinate that only it and the queries use."""
    reason = "pip install native-sparse-attention-pytorch to compare with it"
    package = pytest.importorskip("native_sparse_attention_pytorch", reason=reason)
    config, width = mixer.config, mixer.config.head_width
    with torch.no_grad():
        mixer.w_q.view(config.heads, width, -1)[:, 0] = torch.eye(WIDTH)[0] * 1e4
        mixer.w_k.view(config.kv_heads, width, -1)[:, :2] = 0
        mixer.phi_k.w_out[0] = 0
    phi = nn.Sequential(
        nn.Flatten(-2),
        nn.Linear(config.block * width, width, bias=False),
        nn.SiLU(),
        nn.Linear(width, width, bias=False),
    )
    peer = package.SparseAttention(
        WIDTH,
        width,
        config.heads,
        sliding_window_size=config.window - 1,  # it counts the tokens before
        compress_block_size=config.block,
        compress_block_sliding_stride=config.stride,
        selection_block_size=config.selected_block,
        num_selected_blocks=num_selected,
        kv_heads=config.kv_heads,
        causal=True,
        norm=False,
        compress_mlp=phi,
    ).double()
    with torch.no_grad():
        peer.to_qkv.weight.copy_(torch.cat([mixer.w_q, mixer.w_k, mixer.w_v]))
        peer.combine_heads.weight.copy_(mixer.w_o)
        gate = mixer.w_gate.view(3, config.heads, WIDTH).transpose(0, 1)
        peer.to_strategy_combine[0].weight.copy_(gate.flatten(0, 1))
        peer.to_strategy_combine[0].bias.zero_()
        peer.compress_mem_kv.zero_()
        peer.compress_mem_kv[0, ..., 0] = -1
        for ours, net, position in (
            (mixer.phi_k, peer.k_compress, peer.k_intrablock_positions),
            (mixer.phi_v, peer.v_compress, peer.v_intrablock_positions),
        ):
            net[1].weight.copy_(ours.w_in)
            net[3].weight.copy_(ours.w_out)
            position.copy_(ours.position.view(config.block, width).expand_as(position))
    return peer


EQUAL = NSA(
    4, 2, 6, 4, 4, 4, num_selected=8, window=5, rope_base=10_000.0, separate_kv=False
)  # blocks of 4, side by side


def inputs_of_peer(length: int) -> Tensor:
    x_BTD = noise(2, length, WIDTH, seed=50)
    x_BTD[..., 0] = 1
    return x_BTD.requires_grad_()


def before_ends(length: int) -> Tensor:
    """Tokens that do not end a block: the package shows a block to the tokens after its last."""
    return (torch.arange(length) + 1) % EQUAL.block != 0


def test_all_branches_equal_the_public_package() -> None:
    """All past blocks chosen. Its rotation frequencies are rounded to fp32, hence the tolerance."""
    mixer = built(EQUAL)
    peer = peer_of(mixer, 8)
    x_BTD = inputs_of_peer(22)
    twin, keep_T = x_BTD.detach().clone().requires_grad_(), before_ends(22)
    got = mixer(x_BTD, context((22,), (22,)), None, {})[0][:, keep_T]
    want = peer(twin)[:, keep_T]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got.square().sum().backward()
    want.square().sum().backward()
    assert x_BTD.grad is not None and twin.grad is not None
    torch.testing.assert_close(x_BTD.grad[..., 1:], twin.grad[..., 1:], rtol=1e-5, atol=1e-5)
    for name in ("k", "v"):
        phi, net = getattr(mixer, f"phi_{name}"), getattr(peer, f"{name}_compress")
        torch.testing.assert_close(phi.w_in.grad, net[1].weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixer.w_o.grad, peer.combine_heads.weight.grad, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_choice_equals_the_public_package_where_it_can() -> None:
    """It forces only the own block; compared are queries whose best others include what we force.
    With one query head a key head, its mean of logits and our sum of probabilities rank alike."""
    config = dataclasses.replace(EQUAL, heads=1, kv_heads=1, num_selected=5)
    mixer, length = built(config), 40
    peer = peer_of(mixer, 4)
    x_BTD = inputs_of_peer(length).detach()
    w = {name: p.detach() for name, p in mixer.named_parameters()}
    same_BT = torch.zeros(2, length, dtype=torch.bool)
    for b in range(2):
        _, seen = nsa(w, config, x_BTD[b])
        for t, importance in enumerate(seen[0]):
            own = t // 4
            best = sorted(range(own), key=lambda j: -importance[j])[:4]
            same_BT[b, t] = own > 4 and {0, own - 1} <= set(best) and (t + 1) % 4 != 0
    assert same_BT.sum() >= 10
    got_BTD = mixer(x_BTD, context((length,), (length,)), None, {})[0]
    torch.testing.assert_close(got_BTD[same_BT], peer(x_BTD)[same_BT], rtol=1e-6, atol=1e-6)


# --- state, recompute, config ---------------------------------------------------------------------


def decoded(config: NSA, lengths: list[int], dtype: torch.dtype) -> list[int]:
    """Bytes of the state of two sequences after chunks of these lengths."""
    mixer = config.build(SITE)
    initialise(mixer, 0)
    state = mixer.init_state(2, dtype, torch.device("cpu"))
    sizes: list[int] = []
    for length in lengths:
        x_BTD = noise(2, length, WIDTH, dtype=dtype)
        with torch.no_grad():
            _, state, _ = mixer(x_BTD, Context.continuing(x_BTD[..., 0], state.length), state, {})
        assert state is not None and state.bytes == 2 * mixer.state_bytes(state.length, dtype)
        sizes.append(state.bytes)
    return sizes


def test_the_state_keeps_all_tokens_once_and_rings_for_the_other_branches() -> None:
    """Tokens of the selection, compressed blocks, the window's ring, that of unfinished blocks."""
    sizes = decoded(SMALL, [3, 1, 50], torch.bfloat16)
    kept = [3 + 0 + 3 + 3, 4 + 1 + 4 + 4, 54 + 26 + (5 + SLACK) + (4 + SLACK)]
    assert sizes == [2 * tokens * 2 * 2 * 6 * 2 for tokens in kept]


def test_shared_keys_are_kept_once() -> None:
    sizes = decoded(dataclasses.replace(SMALL, separate_kv=False), [54], torch.float32)
    assert sizes == [2 * (54 + 26 + 4 + SLACK) * 2 * 2 * 6 * 4]


@torch.no_grad()
def test_a_rollback_forgets_blocks_and_completes_them_again() -> None:
    mixer, x_BTD = built(SMALL), noise(1, 60, WIDTH, seed=3)
    want_BTD = mixer(x_BTD, context((60,)), None, {})[0]
    state = mixer.init_state(1, torch.float64, torch.device("cpu"))
    _, state, _ = mixer(x_BTD[:, :48], Context.continuing(x_BTD[:, :48, 0], 0), state, {})
    for back in range(9):
        short, rest = state.rollback(back), x_BTD[:, 48 - back :]
        assert short.compressed[0].shape[1] == (48 - back - 4) // 2 + 1
        got, _, _ = mixer(rest, Context.continuing(rest[..., 0], 48 - back), short, {})
        torch.testing.assert_close(got, want_BTD[:, 48 - back :], rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="cannot roll back 17 tokens; at most 16 here"):
        state.rollback(SLACK + 1)


def test_gates_begin_at_one_half() -> None:
    """The output is then half the sum of the branches: three gates of one are twice that."""
    mixer = SMALL.build(SITE)
    initialise(mixer, 0)
    x_BTD, ctx = noise(1, 46, WIDTH, seed=3), context((46,))
    x_BTD[..., 0] = 1
    half_BTD = mixer(x_BTD, ctx, None, {})[0]
    weights = dict(named_weights(mixer))
    with torch.no_grad():
        weights["w_gate"][:, 0] = 100.0
    torch.testing.assert_close(mixer(x_BTD, ctx, None, {})[0], 2 * half_BTD)


class _Choices(TorchDispatchMode):
    """How often topk ran."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.topk.default
        return func(*args, **(kwargs or {}))


def test_recompute_makes_no_second_choice() -> None:
    """Gradients are the same bits, and topk runs once a layer."""
    lm = ModelConfig(WIDTH, 2 * (PreNorm(SMALL, Dense(12)),), ()).build(30)
    initialise(lm, 0)
    tokens_BT, targets_BT = tokens(2, 46, 30)
    grads: list[dict[str, Tensor]] = []
    calls: list[int] = []
    for recompute in (False, True):
        lm.zero_grad()
        with _Choices() as choices:
            loss = lm.loss(tokens_BT, targets_BT, context((46,), (6, 40)), recompute=recompute)
            loss.total.backward()
        calls.append(choices.count)
        grads.append({n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None})
    assert calls == [2, 2]
    assert grads[0].keys() == grads[1].keys() == dict(lm.named_parameters()).keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_flops_are_those_of_what_a_query_sees() -> None:
    mixer = NSA(2, 1, 10, block=4, stride=2, selected_block=8, num_selected=4, window=5).build(SITE)
    assert mixer.flops(8) == 4 * 2 * 10 * (2 + 4 + 4)
    assert mixer.flops(1000) == 4 * 2 * 10 * (250 + 32 + 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        ({"kv_heads": 0}, r"heads \(4\) must be a multiple of kv_heads \(0\)"),
        ({"head_width": 7}, r"head_width \(7\) must be even"),
        ({"stride": 0}, r"stride \(0\) and window \(5\) must be at least 1"),
        ({"window": 0}, r"stride \(2\) and window \(0\) must be at least 1"),
        ({"block": 5}, r"block \(5\) must be a multiple of stride \(2\)"),
        ({"block": 0}, r"block \(0\) must be a multiple of stride \(2\)"),
        ({"selected_block": 9}, r"selected_block \(9\) must be a multiple of stride \(2\)"),
        ({"num_selected": 2}, r"num_selected \(2\) must be at least 3"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change).build(SITE)
