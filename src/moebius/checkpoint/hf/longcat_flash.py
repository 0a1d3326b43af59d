"""LongCat-Flash (arXiv 2509.01322): two scaled latent attentions and two dense FFNs a layer, beside
them a mixture with zero experts, and one dense multi-token prediction layer.

Published folders, which vLLM and SGLang read, hold the N experts that compute. transformers 5.23
holds gate and up for the Z zero experts as well (never used) but no down, and loads nothing else.
Letters: D model width, N experts, Z zero experts.
"""

import dataclasses
from typing import Any, ClassVar, Final, final

from moebius.checkpoint.hf import Family, Imported, Target, Wanted
from moebius.checkpoint.hf.keys import Keys
from moebius.checkpoint.hf.layout import Entry, Layout, Piece
from moebius.checkpoint.hf.mla_families import (
    EXACT,
    read_latent_rope,
    read_mla,
    refuse_ends_but_mtp,
    refuse_mla,
    refuse_moe,
    write_mla,
)
from moebius.checkpoint.hf.pieces import (
    dense,
    ends,
    experts,
    fused_experts,
    mla,
    nothing,
    rules,
    tied_for,
    unbiased,
    usual_drops,
    whole,
)
from moebius.checkpoint.hf.refusals import Refusals
from moebius.checkpoint.hf.rope import write_rope
from moebius.model.block.scmoe import ScMoE
from moebius.model.ends.mtp import MTP
from moebius.model.ffn.balance.budget import Budget
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import ModelConfig
from moebius.model.mixers.mla import MLA

# Of 12 choices the released model gives 8 to experts that compute; its config does not say so.
FFN_SHARE: Final = 8 / 12


@final
@dataclasses.dataclass(frozen=True)
class LongcatFlash(Family):
    """`LongcatFlashForCausalLM`."""

    model_type: ClassVar[str] = "longcat_flash"
    architecture: ClassVar[str] = "LongcatFlashForCausalLM"
    harmless: ClassVar[frozenset[str]] = frozenset(("ep_size", "params_dtype", "num_nextn_layers"))

    def read_config(self, keys: Keys) -> Imported:
        _fixed(keys)
        num_layers = keys.integer("num_layers", 28)
        # Published configs have none. transformers 5 takes half of it for num_layers, vLLM and
        # SGLang all of it: a number that is right for one makes the other build another model.
        why = "it counts attentions here, layers there; take the key out, num_layers says it"
        keys.must("num_hidden_layers", None, why=why)
        base, scaling = read_latent_rope(keys, 10_000_000.0)
        q_scaled = keys.flag("mla_scale_q_lora", True)
        keys.must("mla_scale_kv_lora", q_scaled, None, why="both latents are scaled, or none")
        q_rank = keys.integer("q_lora_rank", 1536)
        mixer = read_mla(keys, q_rank, base, scaling, scale_correction=q_scaled)
        first = Dense(keys.integer("ffn_hidden_size", 12_288))
        tied = keys.flag("tie_word_embeddings", False)
        predicts = keys.integer("num_nextn_predict_layers", 0)
        keys.must("num_nextn_predict_layers", 0, 1, None, why="it has one such layer at most")
        model = ModelConfig(
            width=keys.integer("hidden_size"),
            layers=num_layers * (ScMoE(mixer, first, _read_moe(keys)),),
            ends=(MTP(mixer, first),) if predicts else (),
            tied=tied,
            embedding_scale=1.0 if tied else None,
            norm_eps=keys.number("rms_norm_eps", 1e-5),
        )
        return Imported(model, keys.integer("vocab_size"))

    def write_config(self, model: ModelConfig, vocab: int, wanted: Wanted) -> dict[str, Any]:
        no, target = Refusals(self.model_type), wanted.target
        layer = no.layers(model, ScMoE)
        mixer = layer and no.kind(layer.mixer, MLA, "layers.*.mixer")
        first = layer and no.kind(layer.dense, Dense, "layers.*.dense")
        moe = layer and no.kind(layer.moe, MoE, "layers.*.moe")
        if mixer:
            _refuse_mixer(no, mixer, model, target)
        if first:
            no.unless(not first.bias, "layers.*.dense.bias", "it has none")
        if moe:
            _refuse_moe(no, moe, target)
        _refuse_ends(no, model, mixer, first)
        no.check()
        assert mixer and first and moe and mixer.rope_base is not None
        return {
            "vocab_size": vocab,
            "hidden_size": model.width,
            "ffn_hidden_size": first.hidden,
            "expert_ffn_hidden_size": moe.expert_width,
            # And no num_hidden_layers. transformers derives it (twice as many); vLLM and SGLang
            # would build that many layers, and take num_layers where it is absent.
            "num_layers": len(model.layers),
            # head_dim among them: transformers takes the rotary width from it, else 64.
            **write_mla(mixer),
            # transformers always scales the latents; vLLM and SGLang do so if told to, folding it
            # into the norms they load: the norms here are without it.
            "mla_scale_q_lora": mixer.scale_correction,
            "mla_scale_kv_lora": mixer.scale_correction,
            "attention_method": "MLA",  # mlx-lm asks for it
            "n_routed_experts": moe.experts,
            "zero_expert_num": moe.zero_experts,
            # vLLM wants it even where there are none. SGLang (issue 10019) leaves their sum
            # unscaled, of the published model as well; nothing in a folder can change that.
            "zero_expert_type": "identity",
            "moe_topk": moe.top_k,
            "norm_topk_prob": False,
            "routed_scaling_factor": moe.scaling * moe.split,
            "router_bias": False,
            # vLLM's spelling and SGLang's.
            "router_dtype": "float32",
            "rounter_params_dtype": "float32",
            "hidden_act": "silu",
            "max_position_embeddings": wanted.context,
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": tied_for(model, target),
            **write_rope(mixer.rope_base, mixer.rope_scaling),
            "initializer_range": 0.02,
            "num_nextn_predict_layers": int(_mtp(model) is not None),
        }

    def layouts(self, model: ModelConfig, vocab: int, target: Target | None) -> tuple[Layout, ...]:
        tied = tied_for(model, target)
        if target is not None:
            return (_layout(model, vocab, tied, target),)
        # Folders of tensors by expert, published or saved; and transformers' names in memory.
        return tuple(_layout(model, vocab, tied, None, fused=fused) for fused in (False, True))


def _fixed(keys: Keys) -> None:
    """What a config may say in one way only."""
    keys.must("hidden_act", "silu", why="the feed-forwards are SwiGLUs")
    keys.must("attention_method", "MLA", why="attention is latent")
    keys.must("zero_expert_type", "identity", why="zero experts return their input")
    keys.must("norm_topk_prob", False, why="weights are not renormalised")
    # transformers makes a bias of the classifier, but never adds it.
    keys.must("router_bias", False, why="transformers ignores the bias that it says there is")
    keys.must("nextn_use_scmoe", False, None, why="the prediction layer is dense")
    keys.must("topk_method", None, "noaux_tc", why="selections are by score plus bias")
    for name in ("router_dtype", "rounter_params_dtype"):
        keys.must(name, "float32", "fp32", None, why="routing is computed in fp32")


def _read_moe(keys: Keys) -> MoE:
    """The mixture, its bias held by LongCat's own rule."""
    N, Z = keys.integer("n_routed_experts", 512), keys.integer("zero_expert_num", 256)
    top_k = keys.integer("moe_topk", 12)
    # The budget steers training alone. As near the released model's share as the numbers allow.
    budget = min(max(FFN_SHARE * top_k, top_k - Z), N) if Z else None
    return MoE(
        experts=N,
        expert_width=keys.integer("expert_ffn_hidden_size", 2048),
        top_k=top_k,
        zero_experts=Z,
        ffn_per_token=budget,
        scaling=keys.number("routed_scaling_factor", 6.0),
        router=Softmax(),
        balance=(Budget(),),
    )


# --- refusing -------------------------------------------------------------------------------------


def _refuse_mixer(no: Refusals, mixer: MLA, model: ModelConfig, target: Target) -> None:
    where = "layers.*.mixer"
    refuse_mla(no, mixer, model, target, where)
    no.unless(mixer.q_rank is not None, f"{where}.q_rank", "its queries have a latent too")
    no.unless(mixer.rope_base is not None, f"{where}.rope_base", "it always rotates")
    scales = mixer.scale_correction or target != "transformers"
    no.unless(scales, f"{where}.scale_correction", "transformers always corrects scales")


def _refuse_moe(no: Refusals, moe: MoE, target: Target) -> None:
    where = "layers.*.moe"
    refuse_moe(no, moe, where)
    no.unless(not moe.shared_experts, f"{where}.shared_experts", "it has none")
    runs = moe.top_k > 1 or target != "transformers"
    no.unless(runs, f"{where}.top_k", "transformers' own class fails with top_k 1")
    router = no.kind(moe.router, Softmax, f"{where}.router")
    if router is not None:
        place = f"{where}.router"
        no.unless(not router.renormalise, f"{place}.renormalise", "it never renormalises")
        no.unless(router.num_groups == 1, f"{place}.num_groups", "it has no groups")
        no.unless(not router.bias, f"{place}.bias", "it has none")


def _refuse_ends(no: Refusals, model: ModelConfig, mixer: MLA | None, first: Dense | None) -> None:
    refuse_ends_but_mtp(no, model)
    predictions = [end for end in model.ends if isinstance(end, MTP)]
    no.unless(len(predictions) <= 1, "ends", "it has one prediction layer at most")
    for end in predictions[:1]:
        place = f"ends.{model.ends.index(end)}"
        no.unless(end.depth == 1, f"{place}.depth", "it predicts one token more")
        same = end.mixer == mixer and end.ffn == first
        no.unless(same, place, "its mixer and ffn must be those of the layers")


def _mtp(model: ModelConfig) -> int | None:
    """Where among the ends the prediction layer is."""
    return next((i for i, end in enumerate(model.ends) if isinstance(end, MTP)), None)


# --- mapping --------------------------------------------------------------------------------------


def _layout(
    model: ModelConfig, vocab: int, tied: bool, target: Target | None, *, fused: bool = False
) -> Layout:
    entries, filled = list(ends(model, vocab, tied)), []
    zeros: set[str] = set()
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, ScMoE) and isinstance(layer.moe, MoE)
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        for j in (0, 1):
            entries += _half(ours, theirs, j, layer, model.width)
        # `mlp` is the mixture, `mlps` are the two dense FFNs.
        entries += _moe(f"{ours}.moe", f"{theirs}.mlp", layer.moe, model.width, target, fused)
        filled += unbiased(f"{theirs}.mlp.router.e_score_correction_bias", layer.moe)
        zeros |= {str(e) for e in range(layer.moe.experts, layer.moe.layout.num_outputs)}
    dropped = usual_drops(tied)
    if zeros:
        each = rf".*\.mlp\.experts\.(?:{'|'.join(sorted(zeros))})\.(?:gate|up)_proj\.weight"
        why = "gate and up of zero experts, which compute nothing"
        dropped.append((rf"{each}|.*\.mlp\.experts\.gate_up_proj", why))
    at = _mtp(model)
    if at is None:
        dropped.append(
            (r"model\.mtp\..*", "multi-token prediction, which config.json does not name")
        )
    else:
        entries += _prediction(f"ends.{at}", model)
        if target is None:
            copy = r"model\.mtp\.embed_tokens\.weight"
            dropped.append((copy, "the prediction layer's copy of the embedding"))
        else:
            entries = [_twice(x) if x.ours == "embed.w_VD" else x for x in entries]
    exact = (*EXACT, r".*\.router\.classifier\.weight")
    return Layout(tuple(entries), tuple(dropped), tuple(filled), exact)


def _half(ours: str, theirs: str, j: int, layer: ScMoE, width: int) -> tuple[Entry, ...]:
    """One attention and one dense FFN of a layer, with their norms."""
    assert isinstance(layer.mixer, MLA) and isinstance(layer.dense, Dense)
    after = f"{theirs}.post_attention_layernorm.{j}.weight"
    return (
        whole(f"{ours}.mixer_norm_{j}.w_D", f"{theirs}.input_layernorm.{j}.weight", width),
        *mla(f"{ours}.mixer_{j}", f"{theirs}.self_attn.{j}", layer.mixer, width),
        whole(f"{ours}.ffn_norm_{j}.w_D", after, width),
        *dense(f"{ours}.dense_{j}", f"{theirs}.mlps.{j}", layer.dense, width),
    )


def _moe(
    ours: str, theirs: str, moe: MoE, width: int, target: Target | None, fused: bool
) -> tuple[Entry, ...]:
    """Router, rules and experts. N + Z of the router's rows, zero experts last, as ours."""
    router, outputs = f"{theirs}.router", moe.layout.num_outputs
    entries = (
        whole(f"{ours}.router.w_ED", f"{router}.classifier.weight", outputs, width),
        *rules(ours, f"{router}.e_score_correction_bias", moe),
    )
    if fused:
        gate_up, down = fused_experts(ours, f"{theirs}.experts", moe, width)
        (piece,) = gate_up.pieces
        rows = dataclasses.replace(
            piece, shape=(outputs, *piece.shape[1:]), part=slice(0, moe.experts)
        )
        return (*entries, dataclasses.replace(gate_up, pieces=(rows,)), down)
    gate_up, down = experts(ours, f"{theirs}.experts", moe, width)
    if target == "transformers":
        names = [f"{e}.{name}_proj" for e in range(moe.experts, outputs) for name in ("gate", "up")]
        shape = (moe.expert_width, width)
        zeros = [nothing(f"{theirs}.experts.{name}.weight", *shape) for name in names]
        gate_up = dataclasses.replace(gate_up, pieces=(*gate_up.pieces, *zeros))
    return (*entries, gate_up, down)


def _prediction(ours: str, model: ModelConfig) -> tuple[Entry, ...]:
    """The prediction layer. transformers ignores it; vLLM and SGLang draft with it.

    Both hand it the hidden state after the final norm, our MTP reads the one before: drafts of what
    was trained here are a little less often right, and what is imported has to be trained a little.
    No token depends on it, since drafts are verified.
    """
    layer = model.layers[0]
    assert isinstance(layer, ScMoE)
    assert isinstance(layer.mixer, MLA) and isinstance(layer.dense, Dense)
    step, theirs, D = f"{ours}.steps.0", "model.mtp.layers.0", model.width
    block = f"{step}.block"
    return (
        whole(f"{step}.token_norm.w_D", f"{theirs}.enorm.m.weight", D),
        whole(f"{step}.hidden_norm.w_D", f"{theirs}.hnorm.m.weight", D),
        whole(f"{step}.w_join", f"{theirs}.eh_proj.weight", D, 2 * D),
        whole(f"{block}.mixer_norm.w_D", f"{theirs}.input_layernorm.weight", D),
        *mla(f"{block}.mixer", f"{theirs}.self_attn", layer.mixer, D),
        whole(f"{block}.ffn_norm.w_D", f"{theirs}.post_attention_layernorm.weight", D),
        # Its FFN alone sits under `transformer_layer`.
        *dense(f"{block}.ffn", f"{theirs}.transformer_layer.mlp", layer.dense, D),
        whole(f"{step}.norm.w_D", "model.mtp.norm.weight", D),
    )


def _twice(embedding: Entry) -> Entry:
    """The embedding, written once more, for the prediction layer."""
    (piece,) = embedding.pieces
    copy = Piece("model.mtp.embed_tokens.weight", piece.shape, turn=piece.turn)
    return dataclasses.replace(embedding, pieces=(copy, piece), fill=0.0)
