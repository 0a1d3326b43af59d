"""Llama 2 and 3 (Touvron et al. 2023; 2407.21783): GQA with halves rotated, dense SwiGLU.

Letters: D model width, K head width.
"""

import dataclasses
from typing import Any, ClassVar, final

from moebius.checkpoint.hf import Family, Imported, Target, Wanted
from moebius.checkpoint.hf.keys import Keys
from moebius.checkpoint.hf.layout import Entry, Layout
from moebius.checkpoint.hf.pieces import dense, ends, exports_tied, gqa, whole
from moebius.checkpoint.hf.refusals import Refusals
from moebius.checkpoint.hf.rope import read_rope, write_rope
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.dense import Dense
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA


@final
@dataclasses.dataclass(frozen=True)
class Llama(Family):
    """`LlamaForCausalLM`."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"

    def read_config(self, keys: Keys) -> Imported:
        width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
        keys.must("hidden_act", "silu", why="the feed-forward is a SwiGLU")
        base, scaling = read_rope(keys)
        mixer = GQA(
            heads=heads,
            kv_heads=keys.integer("num_key_value_heads", heads),
            head_width=keys.integer("head_dim", width // heads),
            rope_base=base,
            rope_scaling=scaling,
            bias=keys.flag("attention_bias", False),
        )
        ffn = Dense(keys.integer("intermediate_size"), bias=keys.flag("mlp_bias", False))
        tied = keys.flag("tie_word_embeddings", False)
        model = ModelConfig(
            width=width,
            layers=keys.integer("num_hidden_layers") * (PreNorm(mixer, ffn),),
            tied=tied,
            embedding_scale=1.0 if tied else None,
            norm_eps=keys.number("rms_norm_eps", 1e-6),
        )
        return Imported(model, keys.integer("vocab_size"))

    def write_config(self, model: ModelConfig, vocab: int, wanted: Wanted) -> dict[str, Any]:
        no = Refusals(self.model_type)
        no.ends(model)
        layer = no.layers(model, PreNorm)
        mixer = layer and no.kind(layer.mixer, GQA, "layers.*.mixer")
        ffn = layer and no.kind(layer.ffn, Dense, "layers.*.ffn")
        if mixer:
            divides = model.width % mixer.heads == 0
            no.unless(divides, "layers.*.mixer.heads", f"must divide the width {model.width}")
            no.unless(mixer.qk_norm == "none", "layers.*.mixer.qk_norm", "it has no QK-norm")
            no.unless(not mixer.sinks, "layers.*.mixer.sinks", "it has no sinks")
            no.unless(mixer.rope_base is not None, "layers.*.mixer.rope_base", "it always rotates")
        no.check()
        assert mixer and ffn and mixer.rope_base is not None
        return {
            "vocab_size": vocab,
            "hidden_size": model.width,
            "intermediate_size": ffn.hidden,
            "num_hidden_layers": len(model.layers),
            "num_attention_heads": mixer.heads,
            "num_key_value_heads": mixer.kv_heads,
            "head_dim": mixer.head_width,
            "hidden_act": "silu",
            "max_position_embeddings": wanted.context,
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": exports_tied(model),
            **write_rope(mixer.rope_base, mixer.rope_scaling),
            "attention_bias": mixer.bias,
            "attention_dropout": 0.0,
            "mlp_bias": ffn.bias,
        }

    def layouts(self, model: ModelConfig, vocab: int, target: Target | None) -> tuple[Layout, ...]:
        entries = list[Entry](ends(model, vocab))
        for i, layer in enumerate(model.layers):
            assert isinstance(layer, PreNorm)
            assert isinstance(layer.mixer, GQA) and isinstance(layer.ffn, Dense)
            ours, theirs, D = f"layers.{i}", f"model.layers.{i}", model.width
            entries += [
                whole(f"{ours}.mixer_norm.w_D", f"{theirs}.input_layernorm.weight", D),
                whole(f"{ours}.ffn_norm.w_D", f"{theirs}.post_attention_layernorm.weight", D),
                *gqa(f"{ours}.mixer", f"{theirs}.self_attn", layer.mixer, D),
                *dense(f"{ours}.ffn", f"{theirs}.mlp", layer.ffn, D),
            ]
        dropped = [(r".*\.rotary_emb\.inv_freq", "computed from the config")]
        if exports_tied(model):
            dropped.append((r"lm_head\.weight", "tied to the embedding"))
        return (Layout(tuple(entries), tuple(dropped)),)
