"""Llama 2 and 3 (Touvron et al. 2023; 2407.21783): GQA with halves rotated, dense SwiGLU.

Letters: D model width.
"""

import dataclasses
from typing import Any, ClassVar, final

from moebius.checkpoint.hf import Family, Imported, Target, Wanted
from moebius.checkpoint.hf.gqa_families import (
    FFN,
    MIXER,
    attention,
    finished,
    read_model,
    refuse_alpha,
    refuse_attention,
    write_attention,
)
from moebius.checkpoint.hf.keys import Keys
from moebius.checkpoint.hf.layout import Entry, Layout
from moebius.checkpoint.hf.pieces import dense, each_layer, ends, exports_tied
from moebius.checkpoint.hf.refusals import Refusals
from moebius.checkpoint.hf.rope import read_plain_rope
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
        base, scaling = read_plain_rope(keys)
        mixer = GQA(
            heads=heads,
            kv_heads=keys.integer("num_key_value_heads", heads),
            head_width=keys.integer("head_dim", width // heads),
            rope_base=base,
            rope_scaling=scaling,
            bias=keys.flag("attention_bias", False),
        )
        ffn = Dense(keys.integer("intermediate_size"), bias=keys.flag("mlp_bias", False))
        layers = keys.integer("num_hidden_layers") * (PreNorm(mixer, ffn),)
        return Imported(read_model(keys, layers, eps=1e-6), keys.integer("vocab_size"))

    def write_config(self, model: ModelConfig, vocab: int, wanted: Wanted) -> dict[str, Any]:
        no = Refusals(self.model_type)
        no.ends(model)
        layer = no.layers(model, PreNorm)
        mixer = layer and no.kind(layer.mixer, GQA, MIXER)
        ffn = layer and no.kind(layer.ffn, Dense, FFN)
        if mixer:
            divides = model.width % mixer.heads == 0
            no.unless(divides, f"{MIXER}.heads", f"must divide the width {model.width}")
            refuse_attention(no, mixer, "none", wanted.target)
            refuse_alpha(no, mixer)
        no.check()
        assert mixer and ffn
        return {
            "vocab_size": vocab,
            "hidden_size": model.width,
            "intermediate_size": ffn.hidden,
            "num_hidden_layers": len(model.layers),
            **write_attention(mixer),
            "hidden_act": "silu",
            "max_position_embeddings": wanted.context,
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": exports_tied(model),
            "mlp_bias": ffn.bias,
        }

    def layouts(self, model: ModelConfig, vocab: int, target: Target | None) -> tuple[Layout, ...]:
        entries = list[Entry](ends(model, vocab))
        for ours, theirs, layer in each_layer(model):
            assert isinstance(layer.ffn, Dense)
            entries += attention(ours, theirs, layer, model.width)
            entries += dense(f"{ours}.ffn", f"{theirs}.mlp", layer.ffn, model.width)
        return (finished(entries, exports_tied(model)),)
