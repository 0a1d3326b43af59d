"""CLA against its equations, values and gradients; and the cache that a group of layers keeps."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.config import from_json, to_json
from moebius.model.block.prenorm import PreNorm
from moebius.model.context import Context
from moebius.model.ffn.dense import Dense
from moebius.model.lm import LM, ModelConfig
from moebius.model.mixers import MixerConfig
from moebius.model.mixers.cla import CLA, shared
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.mla import MLA
from moebius.model.mixers.nsa import NSA
from moebius.model.mixers.swa import SWA
from moebius.model.part import Site
from moebius.model.weight import initialise, named_weights

from .formulas import rms, silu, turn
from .inputs import context, noise, tokens

WIDTH, VOCAB = 12, 20
LATENT = MLA(heads=3, q_rank=5, kv_rank=6, nope_width=3, rope_width=4, v_width=2, rope_base=50.0)
MIXERS: dict[str, MixerConfig] = {
    "gqa_1": GQA(3, 3, 4, rope_base=50.0),
    "gqa_3": GQA(6, 2, 4, rope_base=50.0, qk_norm="head", sinks=True),
    "gqa_8": GQA(8, 1, 4, rope_base=50.0, qk_norm="head_after_rope"),
    "swa": SWA(4, 2, 4, window=3, rope_base=50.0, qk_norm="head"),
    "mla": LATENT,
    "mla_wide_q": dataclasses.replace(LATENT, q_rank=None, rope_base=None),
    "mla_scaled": dataclasses.replace(LATENT, scale_correction=True),
}
CPU = torch.device("cpu")


def stack(of: MixerConfig, *factors: int, width: int = WIDTH) -> ModelConfig:
    """Groups of layers, one after the other, of so many layers each."""
    mixers = [mixer for factor in factors for mixer in shared(of, factor)]
    return ModelConfig(width, tuple(PreNorm(mixer, Dense(7)) for mixer in mixers))


def built(config: ModelConfig) -> LM:
    """A model with norms and sinks of noise, in fp64."""
    lm = config.build(VOCAB)
    initialise(lm, 0)
    with torch.no_grad():
        for i, weight in enumerate(lm.parameters()):
            if weight.ndim == 1:
                weight += 0.3 * noise(*weight.shape, seed=i, dtype=weight.dtype)
    return lm.double()


# --- the equations --------------------------------------------------------------------------------


def attended(q_TX: Tensor, k_TX: Tensor, v_TV: Tensor, scale: float, of: Any, sink: Any) -> Tensor:
    """One head, query by query."""
    rows: list[Tensor] = []
    for t in range(len(q_TX)):
        first = max(0, t - of.window + 1) if isinstance(of, SWA) else 0
        power = torch.stack([(scale * (q_TX[t] @ k_TX[s])).exp() for s in range(first, t + 1)])
        denominator = power.sum() if sink is None else power.sum() + sink.exp()
        rows.append(sum(power[s - first] * v_TV[s] for s in range(first, t + 1)) / denominator)
    return torch.stack(rows)


def placed(x_TK: Tensor, norm: Any, of: Any) -> Tensor:
    """A head's query or key, normed and turned in the order that the config says."""
    if of.qk_norm == "head":
        x_TK = rms(x_TK, norm.w_D, norm.eps)
    x_TK = turn(x_TK, of.rope_base)
    return rms(x_TK, norm.w_D, norm.eps) if of.qk_norm == "head_after_rope" else x_TK


def keys_and_values(writer: Any, h_TD: Tensor, of: Any) -> list[tuple[Tensor, Tensor]]:
    """Of each kv head: finished keys and values."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for w_k, w_v in zip(
        writer.w_k.split(of.head_width), writer.w_v.split(of.head_width), strict=True
    ):
        pairs.append((placed(h_TD @ w_k.T, writer.k_norm, of), h_TD @ w_v.T))
    return pairs


def grouped(reader: Any, h_TD: Tensor, pairs: list[tuple[Tensor, Tensor]], of: Any) -> Tensor:
    """Query heads of one layer over the keys and values of whichever layer."""
    heads: list[Tensor] = []
    for i, w_q in enumerate(reader.heads.w_q.split(of.head_width)):
        k_TK, v_TK = pairs[i // (of.heads // of.kv_heads)]
        q_TK = placed(h_TD @ w_q.T, reader.heads.q_norm, of)
        sink = None if reader.heads.sink_H is None else reader.heads.sink_H[i]
        heads.append(attended(q_TK, k_TK, v_TK, of.head_width**-0.5, of, sink))
    return torch.cat(heads, dim=-1) @ reader.heads.w_o.T


def latents(writer: Any, h_TD: Tensor, of: Any) -> tuple[Tensor, Tensor]:
    """The finished latent and the one rotated key."""
    c_TC, k_TR = (h_TD @ writer.w_kva.T).split([of.kv_rank, of.rope_width], dim=-1)
    scale = (WIDTH / of.kv_rank) ** 0.5 if of.scale_correction else 1.0
    return scale * rms(c_TC, writer.kv_norm.w_D, writer.kv_norm.eps), turn(k_TR, of.rope_base)


def from_latents(reader: Any, h_TD: Tensor, pair: tuple[Tensor, Tensor], of: MLA) -> Tensor:
    """Heads of one layer over its own expansion of the latents of whichever layer."""
    (c_TC, k_TR), queries = pair, reader.queries
    if of.q_rank is not None:
        h_TD = rms(h_TD @ queries.w_qa.T, queries.q_norm.w_D, queries.q_norm.eps)
        h_TD = h_TD * ((WIDTH / of.q_rank) ** 0.5 if of.scale_correction else 1.0)
    query_rows = queries.w_qb.split(of.nope_width + of.rope_width)
    kv_rows = reader.heads.w_kvb.split(of.nope_width + of.v_width)
    heads: list[Tensor] = []
    for w_q, w_kv in zip(query_rows, kv_rows, strict=True):
        plain_TP, turned_TR = (h_TD @ w_q.T).split([of.nope_width, of.rope_width], dim=-1)
        k_TP, v_TV = (c_TC @ w_kv.T).split([of.nope_width, of.v_width], dim=-1)
        q_TX = torch.cat([plain_TP, turn(turned_TR, of.rope_base)], dim=-1)
        score_scale = (of.nope_width + of.rope_width) ** -0.5
        k_TX = torch.cat([k_TP, k_TR], dim=-1)
        heads.append(attended(q_TX, k_TX, v_TV, score_scale, of, None))
    return torch.cat(heads, dim=-1) @ reader.heads.w_o.T


def written_out(lm: Any, tokens_T: Tensor, of: Any, factors: tuple[int, ...]) -> Tensor:
    """Hidden states of one document: keys and values come from the first layer of each group."""
    begin, read = (latents, from_latents) if isinstance(of, MLA) else (keys_and_values, grouped)
    x_TD, layers = lm.embed.w_VD[tokens_T], iter(lm.layers)
    for factor in factors:
        lent: Any = None
        for place in range(factor):
            layer = next(layers)
            h_TD = rms(x_TD, layer.mixer_norm.w_D, 1e-5)
            if place == 0:
                lent = begin(layer.mixer.writer, h_TD, of)
            x_TD = x_TD + read(layer.mixer.reader, h_TD, lent, of)
            h_TD = rms(x_TD, layer.ffn_norm.w_D, 1e-5)
            gate_TF, up_TF = (h_TD @ layer.ffn.w_gate_up.T).chunk(2, dim=-1)
            x_TD = x_TD + (silu(gate_TF) * up_TF) @ layer.ffn.w_down.T
    return x_TD


@pytest.mark.parametrize("factors", [(2,), (4,), (2, 2)], ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_values_and_gradients_are_those_of_the_equations(
    name: str, factors: tuple[int, ...]
) -> None:
    of = MIXERS[name]
    lm, (tokens_BT, _) = built(stack(of, *factors)), tokens(1, 7, VOCAB)
    got_TD = lm(tokens_BT, context((4, 3)), dtype=torch.float64).hidden_BTD[0]
    parts = [written_out(lm, tokens_BT[0, rows], of, factors) for rows in (slice(4), slice(4, 7))]
    want_TD = torch.cat(parts)
    torch.testing.assert_close(got_TD, want_TD, rtol=1e-10, atol=1e-12)
    weights = {n: weight for n, weight in named_weights(lm) if not n.startswith("head.")}
    probe_TD = noise(7, WIDTH, seed=9)
    got, want = (
        torch.autograd.grad((x_TD * probe_TD).sum(), list(weights.values()))
        for x_TD in (got_TD, want_TD)
    )
    for weight, got_grad, want_grad in zip(weights, got, want, strict=True):
        assert want_grad.any(), f"{weight} has no part in this"
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-8, atol=1e-11, msg=weight)


# --- decoding -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 10, 29])
@pytest.mark.parametrize("name", MIXERS)
def test_decoding_equals_the_whole_sequence(name: str, chunk: int) -> None:
    """Also where a stray draft is decoded, and rolled back, after each chunk."""
    lm, (tokens_BT, _) = built(stack(MIXERS[name], 3, 2)), tokens(2, 29, VOCAB)
    want_BTD = lm(tokens_BT, Context.continuing(tokens_BT, 0), dtype=torch.float64).hidden_BTD
    states, seen = lm.init_states(2, torch.float64, CPU), 0
    for part_BT in tokens_BT.split(chunk, dim=1):
        ctx = Context.continuing(part_BT, seen)
        out = lm(part_BT, ctx, states, dtype=torch.float64)
        want_part_BTD = want_BTD[:, seen : seen + part_BT.shape[1]]
        torch.testing.assert_close(out.hidden_BTD, want_part_BTD, rtol=1e-9, atol=1e-11)
        seen += part_BT.shape[1]
        stray_BT = tokens_BT[:, :4].flip(1)
        strayed = lm(stray_BT, Context.continuing(stray_BT, seen), out.states, dtype=torch.float64)
        states = tuple((layer[0].rollback(4),) for layer in strayed.states)
        assert {layer[0].length for layer in states} == {seen}


def held(states: Any) -> int:
    """Bytes of the storages that the tensors of decode states lie in."""
    storages = {
        id(entry): entry.untyped_storage().nbytes()
        for layer in states
        for state in layer
        for value in vars(state).values()
        for entry in (value if isinstance(value, tuple) else ())
    }
    return sum(storages.values())


# Of hunyuan_large.md: bytes per token of 64 layers of 80 heads of 80 in bf16.
SCHEMES = {
    "MHA": (80, 1, 1_638_400),
    "GQA": (8, 1, 163_840),
    "MQA": (1, 1, 20_480),
    "CLA": (80, 2, 819_200),
    "GQA+CLA": (8, 2, 81_920),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("scheme", "device", "width"),
    [*((scheme, "cpu", 4) for scheme in SCHEMES), ("GQA+CLA", "meta", 6400)],
)
def test_the_cache_of_hunyuan_large(scheme: str, device: str, width: int) -> None:
    """A prefill of 5 tokens and a step; on a CPU with a thin residual stream, on meta in full."""
    kv_heads, factor, per_token = SCHEMES[scheme]
    config = stack(GQA(80, kv_heads, 80, qk_norm="head"), *(64 // factor) * (factor,), width=width)
    with torch.device(device):
        lm = config.build(VOCAB)
        tokens_BT = torch.zeros(2, 6, dtype=torch.int64)
    states, seen = lm.init_states(2, torch.bfloat16, torch.device(device)), 0
    for part_BT in tokens_BT.split(5, dim=1):
        ctx = Context.continuing(part_BT, seen)
        states, seen = lm(part_BT, ctx, states, dtype=torch.bfloat16).states, seen + len(part_BT[0])
    assert len(states) == 64
    assert held(states) == 2 * 6 * per_token
    assert sum(state.bytes for layer in states for state in layer) == 2 * 6 * per_token
    mixers = [mixer for block in lm.blocks() for mixer in block.mixers()]
    assert sum(mixer.state_bytes(6, torch.bfloat16) for mixer in mixers) == 6 * per_token


def test_shares_of_the_cache() -> None:
    sizes = {scheme: per_token for scheme, (_, _, per_token) in SCHEMES.items()}
    assert sizes["CLA"] * 2 == sizes["MHA"]
    assert sizes["GQA+CLA"] * 20 == sizes["MHA"]


# --- configs --------------------------------------------------------------------------------------


def test_a_group_is_one_lender_and_its_borrowers() -> None:
    of = GQA(4, 2, 8)
    assert shared(of, 1) == (CLA(of),)
    assert shared(of, 3) == (CLA(of), CLA(of, borrows=True), CLA(of, borrows=True))
    with pytest.raises(ValueError, match="1 layer or more, not 0"):
        shared(of, 0)
    config = stack(LATENT, 2, 2)
    assert from_json(ModelConfig, to_json(config)) == config


def test_a_borrower_has_no_keys_and_values_of_its_own() -> None:
    lm = built(stack(GQA(6, 2, 4, qk_norm="head", bias=True), 2))
    lender, borrower = (
        {name for name, _ in named_weights(block.mixers()[0])} for block in lm.blocks()
    )
    names = ("w_k", "w_v", "b_k", "b_v", "k_norm.w_D")
    assert lender - borrower == {f"writer.{name}" for name in names}
    names = ("w_q", "w_o", "b_q", "b_o", "q_norm.w_D")
    assert borrower == {f"reader.heads.{name}" for name in names}


@pytest.mark.parametrize("borrows", [False, True])
@pytest.mark.parametrize(
    ("of", "message"),
    [
        (CLA(GQA(4, 2, 8)), "shares the keys and values of gqa, swa or mla, not of cla"),
        (NSA(4, 2, 8), "not of nsa"),
        (GQA(4, 3, 8), r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        (SWA(4, 2, 8, window=0), r"window \(0\) must be at least 1"),
        (dataclasses.replace(LATENT, rope_width=3), r"rope_width \(3\) must be even"),
    ],
    ids=str,
)
def test_what_cannot_be_shared_is_refused(of: MixerConfig, borrows: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLA(of, borrows).build(Site(WIDTH, 2, 0, 1e-5))
