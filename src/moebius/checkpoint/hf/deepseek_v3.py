"""DeepSeek-V3 (arXiv 2412.19437) and what shares its class (Moonlight, Kimi K2): latent attention,
leading dense layers, then mixtures with sigmoid scores, groups and shared experts.

Published checkpoints end in a multi-token prediction layer with a mixture of its own, which our MTP
end is not: it is left out and counted. Letters: D model width.
"""

import dataclasses
from typing import Any, ClassVar, final

from moebius.checkpoint.hf import Family, Imported, Target, Wanted
from moebius.checkpoint.hf.keys import Keys
from moebius.checkpoint.hf.layout import Layout
from moebius.checkpoint.hf.mla_families import (
    EXACT,
    MoENames,
    left_out_ends,
    maybe_empty,
    read_latent_rope,
    read_mla,
    read_moe,
    refuse_ends_but_mtp,
    refuse_mla,
    refuse_sigmoid_moe,
    sigmoid_moe,
    write_mla,
    write_moe,
)
from moebius.checkpoint.hf.pieces import (
    dense,
    each_layer,
    ends,
    experts,
    fused_experts,
    mla,
    norms,
    tied_for,
    unbiased,
    usual_drops,
)
from moebius.checkpoint.hf.refusals import Refusals
from moebius.checkpoint.hf.rope import write_rope
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.lm import ModelConfig
from moebius.model.mixers.mla import MLA

NAMES = MoENames(
    experts="n_routed_experts",
    top_k="num_experts_per_tok",
    shared="n_shared_experts",
    groups="n_group",
    renormalise="norm_topk_prob",
)


@final
@dataclasses.dataclass(frozen=True)
class DeepseekV3(Family):
    """`DeepseekV3ForCausalLM`."""

    model_type: ClassVar[str] = "deepseek_v3"
    architecture: ClassVar[str] = "DeepseekV3ForCausalLM"
    # The last is taken from the tensors: what is past num_hidden_layers is left out.
    harmless: ClassVar[frozenset[str]] = frozenset(
        ("aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers")
    )

    def read_config(self, keys: Keys) -> Imported:
        keys.must("hidden_act", "silu", why="the feed-forwards are SwiGLUs")
        keys.must("scoring_func", "sigmoid", why="DeepSeek-V3 scores by sigmoid")
        keys.must("topk_method", "noaux_tc", why="selections are by score plus bias")
        keys.must("moe_layer_freq", 1, why="every layer after the first ones is a mixture")
        # Published models turn pairs. The names of halves are the same, so nothing would tell.
        keys.must("rope_interleave", True, why="rows for halves are not told apart from pairs")
        base, scaling = read_latent_rope(keys, 10_000.0)
        mixer = read_mla(keys, keys.integer_or_none("q_lora_rank"), base, scaling)
        first = PreNorm(mixer, Dense(keys.integer("intermediate_size")))
        rest = PreNorm(mixer, read_moe(keys, NAMES, width=2048, scaling=2.5, groups=8, top=4))
        layers, k = keys.integer("num_hidden_layers"), keys.integer("first_k_dense_replace", 3)
        tied = keys.flag("tie_word_embeddings", False)
        model = ModelConfig(
            width=keys.integer("hidden_size"),
            layers=min(k, layers) * (first,) + max(0, layers - k) * (rest,),
            tied=tied,
            embedding_scale=1.0 if tied else None,
            norm_eps=keys.number("rms_norm_eps", 1e-6),
        )
        return Imported(model, keys.integer("vocab_size"))

    def write_config(self, model: ModelConfig, vocab: int, wanted: Wanted) -> dict[str, Any]:
        no = Refusals(self.model_type)
        refuse_ends_but_mtp(no, model)
        layers = no.prenorms(model)
        mixers, ffns = [layer.mixer for layer in layers], [layer.ffn for layer in layers]
        no.only(mixers, "layers.*.mixer", MLA)
        no.only(ffns, "layers.*.ffn", Dense, MoE)
        mixer = no.the(mixers, "layers.*.mixer", MLA)
        first, moe = no.the(ffns, "layers.*.ffn", Dense), no.the(ffns, "layers.*.ffn", MoE)
        k = sum(isinstance(ffn, Dense) for ffn in ffns)
        leading = all(isinstance(ffn, Dense) for ffn in ffns[:k])
        no.unless(leading, "layers.*.ffn", "its dense layers come before all mixtures")
        no.unless(k < len(ffns), "layers.*.ffn", "it needs a mixture of experts in some layer")
        if mixer is not None:
            refuse_mla(no, mixer, model, wanted.target, "layers.*.mixer")
            place = "layers.*.mixer"
            no.unless(not mixer.scale_correction, f"{place}.scale_correction", "it has none")
            no.unless(mixer.rope_base is not None, f"{place}.rope_base", "it always rotates")
        if first is not None:
            no.unless(not first.bias, "layers.*.ffn.bias", "it has none")
        if moe is not None:
            refuse_sigmoid_moe(no, moe, "layers.*.ffn")
        no.check()
        assert mixer and moe and mixer.rope_base is not None
        return {
            "vocab_size": vocab,
            "hidden_size": model.width,
            "intermediate_size": first.hidden if first else moe.expert_width,
            "num_hidden_layers": len(layers),
            "first_k_dense_replace": k,
            "moe_layer_freq": 1,
            **write_mla(mixer),
            **write_moe(NAMES, moe, wanted.target),
            # Without these vLLM has no selection bias, and takes softmax scores.
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "hidden_act": "silu",
            "max_position_embeddings": wanted.context,
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": tied_for(model, wanted.target),
            **write_rope(mixer.rope_base, mixer.rope_scaling),
            "rope_interleave": True,
            # transformers and servers assume one prediction layer where this is absent.
            "num_nextn_predict_layers": 0,
        }

    def layouts(self, model: ModelConfig, vocab: int, target: Target | None) -> tuple[Layout, ...]:
        tied = tied_for(model, target)
        if target is not None:
            return (_layout(model, vocab, tied, empty=target == "transformers"),)
        # Published and saved folders have tensors for each expert, memory has fused ones.
        empties = maybe_empty(layer.ffn for layer in model.layers if isinstance(layer, PreNorm))
        return tuple(
            _layout(model, vocab, tied, empty=empty, fused=fused)
            for fused in (False, True)
            for empty in empties
        )


def _layout(
    model: ModelConfig, vocab: int, tied: bool, *, empty: bool, fused: bool = False
) -> Layout:
    D, each = model.width, fused_experts if fused else experts
    entries = [*ends(model, vocab, tied), *left_out_ends(model, vocab)]
    filled = []
    for ours, theirs, layer in each_layer(model):
        assert isinstance(layer.mixer, MLA)
        entries += norms(ours, theirs, D)
        entries += mla(f"{ours}.mixer", f"{theirs}.self_attn", layer.mixer, D)
        ffn, places = layer.ffn, (f"{ours}.ffn", f"{theirs}.mlp")
        if isinstance(ffn, Dense):
            entries += dense(*places, ffn, D)
            continue
        assert isinstance(ffn, MoE)
        entries += sigmoid_moe(*places, ffn, D, empty)
        entries += each(places[0], f"{places[1]}.experts", ffn, D)
        filled += unbiased(f"{places[1]}.gate.e_score_correction_bias", ffn)
    return Layout(tuple(entries), _dropped(model, tied), tuple(filled), EXACT)


def _dropped(model: ModelConfig, tied: bool) -> tuple[tuple[str, str], ...]:
    own = "|".join(str(i) for i in range(len(model.layers)))
    parts = r"enorm|hnorm|eh_proj|embed_tokens|shared_head|\w+_layernorm|self_attn|mlp"
    past = rf"model\.layers\.(?!(?:{own})\.)\d+\.(?:{parts})\..*"
    why = "multi-token prediction by a mixture of experts, past num_hidden_layers"
    return (*usual_drops(tied), (past, why))
