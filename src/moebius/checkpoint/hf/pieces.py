"""Maps that families share: attention, feed-forwards, experts, balance rules, norms, both ends.

Each gives entries for one part of ours, from the part's config and the two prefixes. Letters: D
model width, H query heads, G key and value heads, K head width, F hidden width, E experts.
"""

from collections.abc import Iterator, Sequence

import torch

from moebius.checkpoint.hf import Target
from moebius.checkpoint.hf.layout import SAME, Entry, Index, Pairs, Piece, Scaled, Turn
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.mla import MLA

Names = tuple[str, str, str]
GATE_UP_DOWN: Names = ("gate_proj", "up_proj", "down_proj")


def whole(ours: str, theirs: str, *shape: int, turn: Turn = SAME) -> Entry:
    """One tensor of theirs is one of ours, of the same shape."""
    return Entry(ours, shape, (Piece(theirs, shape, turn=turn),))


def each_layer(model: ModelConfig) -> Iterator[tuple[str, str, PreNorm]]:
    """Our prefix, theirs, and the layer."""
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, PreNorm)
        yield f"layers.{i}", f"model.layers.{i}", layer


def norms(ours: str, theirs: str, width: int) -> tuple[Entry, ...]:
    """The two norms of a pre-norm layer."""
    return (
        whole(f"{ours}.mixer_norm.w_D", f"{theirs}.input_layernorm.weight", width),
        whole(f"{ours}.ffn_norm.w_D", f"{theirs}.post_attention_layernorm.weight", width),
    )


def gqa(
    ours: str,
    theirs: str,
    config: GQA,
    width: int,
    out: str = "o_proj",
    qk_norms: tuple[str, str] = ("q_norm", "k_norm"),
) -> tuple[Entry, ...]:
    """Grouped-query attention, biases and QK-norm included; theirs rotate halves."""
    H, G, K = config.heads, config.kv_heads, config.head_width
    turn = SAME if config.rope_base is None else Pairs(K)
    entries = [
        whole(f"{ours}.heads.w_q", f"{theirs}.q_proj.weight", H * K, width, turn=turn),
        whole(f"{ours}.heads.w_o", f"{theirs}.{out}.weight", width, H * K),
        whole(f"{ours}.kv.w_k", f"{theirs}.k_proj.weight", G * K, width, turn=turn),
        whole(f"{ours}.kv.w_v", f"{theirs}.v_proj.weight", G * K, width),
    ]
    if config.bias:
        entries += [
            whole(f"{ours}.heads.b_q", f"{theirs}.q_proj.bias", H * K, turn=turn),
            whole(f"{ours}.heads.b_o", f"{theirs}.{out}.bias", width),
            whole(f"{ours}.kv.b_k", f"{theirs}.k_proj.bias", G * K, turn=turn),
            whole(f"{ours}.kv.b_v", f"{theirs}.v_proj.bias", G * K),
        ]
    if config.qk_norm != "none":
        q, k = (H * K, G * K) if config.qk_norm == "full" else (K, K)
        q_name, k_name = (f"{theirs}.{name}.weight" for name in qk_norms)
        entries += [
            whole(f"{ours}.heads.q_norm.w_D", q_name, q, turn=turn),
            whole(f"{ours}.kv.k_norm.w_D", k_name, k, turn=turn),
        ]
    if config.sinks:
        entries.append(whole(f"{ours}.heads.sink_H", f"{theirs}.sinks", H))
    return tuple(entries)


def mla(ours: str, theirs: str, config: MLA, width: int) -> tuple[Entry, ...]:
    """Latent attention under DeepSeek's names; theirs rotate pairs, as ours."""
    heads, nope, rope = config.heads, config.nope_width, config.rope_width
    C, Q = config.kv_rank, config.q_rank
    q_name, q_in = ("q_proj", width) if Q is None else ("q_b_proj", Q)
    v_out, kv_out = heads * config.v_width, heads * (nope + config.v_width)
    down, latents = f"{theirs}.kv_a_proj_with_mqa", f"{ours}.latents"
    q_out = heads * (nope + rope)
    entries = [
        whole(f"{ours}.queries.w_qb", f"{theirs}.{q_name}.weight", q_out, q_in),
        whole(f"{latents}.w_kva", f"{down}.weight", C + rope, width),
        whole(f"{latents}.kv_norm.w_D", f"{theirs}.kv_a_layernorm.weight", C),
        whole(f"{ours}.heads.w_kvb", f"{theirs}.kv_b_proj.weight", kv_out, C),
        whole(f"{ours}.heads.w_o", f"{theirs}.o_proj.weight", width, v_out),
    ]
    if Q is not None:
        entries += [
            whole(f"{ours}.queries.w_qa", f"{theirs}.q_a_proj.weight", Q, width),
            whole(f"{ours}.queries.q_norm.w_D", f"{theirs}.q_a_layernorm.weight", Q),
        ]
    if config.bias:
        entries += [
            whole(f"{latents}.b_kva", f"{down}.bias", C + rope),
            whole(f"{ours}.heads.b_o", f"{theirs}.o_proj.bias", width),
        ]
        if Q is not None:
            entries.append(whole(f"{ours}.queries.b_qa", f"{theirs}.q_a_proj.bias", Q))
    return tuple(entries)


def halves_of(ours: str, gate: str, up: str, hidden: int, *rest: int) -> Entry:
    """The gate's rows, then the up-projection's: [2F, ...]."""
    shape = (hidden, *rest)
    top = Piece(gate, shape, at=(slice(0, hidden),))
    bottom = Piece(up, shape, at=(slice(hidden, 2 * hidden),))
    return Entry(ours, (2 * hidden, *rest), (top, bottom))


def swiglu(
    gate_up: str,
    down: str,
    theirs: str,
    hidden: int,
    width: int,
    names: Names = GATE_UP_DOWN,
) -> tuple[Entry, ...]:
    """The two matrices of a SwiGLU, named in full on our side."""
    gate, up, out = (f"{theirs}.{name}.weight" for name in names)
    return halves_of(gate_up, gate, up, hidden, width), whole(down, out, width, hidden)


def dense(ours: str, theirs: str, config: Dense, width: int) -> tuple[Entry, ...]:
    """A dense feed-forward, biases included."""
    F = config.hidden
    entries = swiglu(f"{ours}.w_gate_up", f"{ours}.w_down", theirs, F, width)
    if config.bias:
        gate, up, down = (f"{theirs}.{name}.bias" for name in GATE_UP_DOWN)
        entries += (
            halves_of(f"{ours}.b_gate_up", gate, up, F),
            whole(f"{ours}.b_down", down, width),
        )
    return entries


def experts(
    ours: str, theirs: str, config: MoE, width: int, names: Names = GATE_UP_DOWN
) -> tuple[Entry, ...]:
    """Routed experts that have tensors of their own: `theirs.E.gate_proj.weight` and so on."""
    E, F = config.experts, config.expert_width
    gate_up: list[Piece] = []
    down: list[Piece] = []
    for e in range(E):
        gate, up, out = (f"{theirs}.{e}.{name}.weight" for name in names)
        halves: Sequence[Index] = ((e, slice(0, F)), (e, slice(F, 2 * F)))
        gate_up += [Piece(gate, (F, width), at=halves[0]), Piece(up, (F, width), at=halves[1])]
        down.append(Piece(out, (width, F), at=(e,)))
    return (
        Entry(f"{ours}.w_gate_up_E2FD", (E, 2 * F, width), tuple(gate_up)),
        Entry(f"{ours}.w_down_EDF", (E, width, F), tuple(down)),
    )


def fused_experts(ours: str, theirs: str, config: MoE, width: int) -> tuple[Entry, ...]:
    """Routed experts in two tensors, as transformers holds them: gate_up [E, 2F, D], down."""
    E, F = config.experts, config.expert_width
    return (
        whole(f"{ours}.w_gate_up_E2FD", f"{theirs}.gate_up_proj", E, 2 * F, width),
        whole(f"{ours}.w_down_EDF", f"{theirs}.down_proj", E, width, F),
    )


def embedding_scale(model: ModelConfig) -> float:
    """What our embedding multiplies looked-up vectors by; that of every family here is 1."""
    if model.embedding_scale is not None:
        return model.embedding_scale
    return model.width**0.5 if model.tied else 1.0


def exports_tied(model: ModelConfig) -> bool:
    """Whether one tensor can serve as embedding and head: what `tie_word_embeddings` says."""
    return model.tied and embedding_scale(model) == 1.0


def ends(model: ModelConfig, vocab: int, tied: bool | None = None) -> tuple[Entry, ...]:
    """Embedding, final norm and head. Tied, theirs has one tensor for the two of ours.

    Where ours scales the embedding, theirs are two tensors, the scale multiplied into the first;
    also where a loader cannot tie (`tied` False).
    """
    tied = exports_tied(model) if tied is None else tied
    D, scale, embed = model.width, embedding_scale(model), "model.embed_tokens.weight"
    turn = SAME if scale == 1.0 else Scaled(scale)
    return (
        whole("embed.w_VD", embed, vocab, D, turn=turn),
        whole("head.norm.w_D", "model.norm.weight", D),
        whole("head.w_VD", embed if tied else "lm_head.weight", vocab, D),
    )


def biased_rules(moe: MoE) -> tuple[str, ...]:
    """The names, below `rules`, of the buffers that move a selection."""
    found: list[str] = []
    for i, config in enumerate(moe.balance):
        rule = config.build(moe.layout)
        bias = rule.bias_E()
        found += [f"{i}.{name}" for name, x in rule.named_buffers() if x is bias]
    return tuple(found)


def rules(ours: str, theirs: str, moe: MoE) -> tuple[Entry, ...]:
    """The buffers of the balance rules: the selection bias, and what only steers training."""
    biased, entries = biased_rules(moe), list[Entry]()
    for i, config in enumerate(moe.balance):
        with torch.device("cpu"):
            state = config.build(moe.layout).state_dict()
        for name, x in state.items():
            if f"{i}.{name}" in biased:
                entries.append(whole(f"{ours}.rules.{i}.{name}", theirs, *x.shape))
                continue
            start, why = float(x.flatten()[0]), "a balance rule's memory; it only steers training"
            entries.append(Entry(f"{ours}.rules.{i}.{name}", tuple(x.shape), fill=start, why=why))
    return tuple(entries)


def unbiased(theirs: str, moe: MoE) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """The selection bias that an export adds, as zeros, where no rule holds one."""
    return () if biased_rules(moe) else ((theirs, (moe.layout.num_outputs,), torch.float32),)


def nothing(theirs: str, *shape: int) -> Piece:
    """No rows of a tensor of theirs, which is there all the same: written as zeros."""
    return Piece(theirs, shape, at=(slice(0, 0),), part=slice(0, 0))


def tied_for(model: ModelConfig, target: Target | None) -> bool:
    """Whether one tensor is embedding and head, where servers do not tie: they get both tensors."""
    return exports_tied(model) and target in (None, "transformers")


def usual_drops(tied: bool) -> list[tuple[str, str]]:
    """What folders of any family may hold besides, with the reason why it is left out."""
    dropped = [(r".*\.rotary_emb\.inv_freq", "computed from the config")]
    if tied:
        dropped.append((r"lm_head\.weight", "tied to the embedding"))
    return dropped
