"""OLMoE (Muennighoff et al., 2409.02060): attention that norms all heads at once, mixtures by
softmax without renormalisation.

Letters: D model width.
"""

import dataclasses
from typing import Any, ClassVar, Final, final

from moebius.checkpoint.hf import Family, Imported, Target, Wanted
from moebius.checkpoint.hf.gqa_families import (
    FFN,
    MIXER,
    attention,
    finished,
    read_count,
    read_model,
    refuse_alpha,
    refuse_attention,
    refuse_mixture,
    router,
    write_attention,
)
from moebius.checkpoint.hf.keys import Keys
from moebius.checkpoint.hf.layout import Entry, Layout
from moebius.checkpoint.hf.pieces import each_layer, ends, experts, fused_experts, tied_for
from moebius.checkpoint.hf.refusals import Refusals
from moebius.checkpoint.hf.rope import read_plain_rope
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA

# vLLM and SGLang do not read rms_norm_eps.
SERVED_EPS: Final = 1e-5


@final
@dataclasses.dataclass(frozen=True)
class OLMoE(Family):
    """`OlmoeForCausalLM`."""

    model_type: ClassVar[str] = "olmoe"
    architecture: ClassVar[str] = "OlmoeForCausalLM"

    def read_config(self, keys: Keys) -> Imported:
        keys.must("hidden_act", "silu", why="the feed-forwards are SwiGLUs")
        keys.must("clip_qkv", None, why="queries, keys and values are not clipped here")
        width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
        if width % heads:
            raise ValueError(f"config.json: {heads} heads do not divide hidden_size, {width}")
        keys.must("head_dim", width // heads, None, why="heads share hidden_size among them")
        base, scaling = read_plain_rope(keys)
        mixer = GQA(
            heads=heads,
            kv_heads=keys.integer("num_key_value_heads", heads),
            head_width=width // heads,
            rope_base=base,
            rope_scaling=scaling,
            qk_norm="full",
            bias=keys.flag("attention_bias", False),
        )
        moe = MoE(
            experts=read_count(keys, "num_experts", "num_local_experts", default=64),
            expert_width=keys.integer("intermediate_size", 2048),
            top_k=keys.integer("num_experts_per_tok", 8),
            router=Softmax(renormalise=keys.flag("norm_topk_prob", False)),
        )
        layers = keys.integer("num_hidden_layers") * (PreNorm(mixer, moe),)
        return Imported(read_model(keys, layers, eps=1e-5), keys.integer("vocab_size"))

    def write_config(self, model: ModelConfig, vocab: int, wanted: Wanted) -> dict[str, Any]:
        no = Refusals(self.model_type)
        no.ends(model)
        layer = no.layers(model, PreNorm)
        mixer = layer and no.kind(layer.mixer, GQA, MIXER)
        moe = layer and no.kind(layer.ffn, MoE, FFN)
        chosen = moe and refuse_mixture(no, moe)
        if mixer:
            refuse_attention(no, mixer, "full", wanted.target)
            refuse_alpha(no, mixer)
            shared = mixer.heads * mixer.head_width == model.width
            why = f"its heads share the width, {model.width}"
            no.unless(shared, f"{MIXER}.head_width", why)
        if mixer and chosen:
            _refuse_served(no, model, mixer, chosen, wanted.target)
        no.check()
        assert mixer and moe and chosen
        return {
            "vocab_size": vocab,
            "hidden_size": model.width,
            "intermediate_size": moe.expert_width,
            "num_hidden_layers": len(model.layers),
            **write_attention(mixer),
            "hidden_act": "silu",
            "max_position_embeddings": wanted.context,
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": tied_for(model, wanted.target),
            "clip_qkv": None,
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": chosen.renormalise,
        }

    def layouts(self, model: ModelConfig, vocab: int, target: Target | None) -> tuple[Layout, ...]:
        tied = tied_for(model, target)
        # Published and saved folders have tensors for each expert, memory has fused ones.
        kinds = (False, True) if target is None else (False,)
        return tuple(_layout(model, vocab, tied, fused) for fused in kinds)


def _refuse_served(
    no: Refusals, model: ModelConfig, mixer: GQA, chosen: Softmax, target: Target
) -> None:
    """What vLLM's and SGLang's classes do not read."""
    if target == "transformers":
        return
    no.unless(not mixer.bias, f"{MIXER}.bias", f"{target} has none")
    eps = f"{target} always takes {SERVED_EPS}"
    no.unless(model.norm_eps == SERVED_EPS, "norm_eps", eps)
    never = f"{target} never divides by the sum of the selected weights"
    no.unless(not chosen.renormalise, f"{FFN}.router.renormalise", never)
    if target == "sglang":
        why = "sglang norms keys of as many heads as queries"
        no.unless(mixer.kv_heads == mixer.heads, f"{MIXER}.kv_heads", why)


def _layout(model: ModelConfig, vocab: int, tied: bool, fused: bool) -> Layout:
    D, each = model.width, fused_experts if fused else experts
    entries = list[Entry](ends(model, vocab, tied))
    for ours, theirs, layer in each_layer(model):
        assert isinstance(layer.ffn, MoE)
        entries += attention(ours, theirs, layer, D)
        entries += router(f"{ours}.ffn", f"{theirs}.mlp.gate", layer.ffn, D)
        entries += each(f"{ours}.ffn", f"{theirs}.mlp.experts", layer.ffn, D)
    return finished(entries, tied)
