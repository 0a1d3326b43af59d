"""Qwen3-MoE (Qwen3 technical report, 2505.09388): GQA with a norm of each head, mixtures by softmax
and, where a config says so, dense layers among them.

transformers lets every layer slide or none and does not read `max_window_layers`; other loaders do.
Letters: D model width.
"""

import dataclasses
from typing import Any, ClassVar, Final, final

from moebius.checkpoint.hf import Family, Imported, Target, Wanted
from moebius.checkpoint.hf.gqa_families import (
    FFN,
    MIXER,
    Attention,
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
from moebius.checkpoint.hf.pieces import dense, each_layer, ends, experts, fused_experts, tied_for
from moebius.checkpoint.hf.refusals import Refusals
from moebius.checkpoint.hf.rope import read_plain_rope
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.swa import SWA

# Published configs say the first, transformers 5 saves the second.
_EXPERTS: Final = ("num_experts", "num_local_experts")


@final
@dataclasses.dataclass(frozen=True)
class Qwen3MoE(Family):
    """`Qwen3MoeForCausalLM`."""

    model_type: ClassVar[str] = "qwen3_moe"
    architecture: ClassVar[str] = "Qwen3MoeForCausalLM"

    def read_config(self, keys: Keys) -> Imported:
        keys.must("hidden_act", "silu", why="the feed-forwards are SwiGLUs")
        mixer, first = _read_attention(keys), Dense(keys.integer("intermediate_size", 6144))
        moe = MoE(
            experts=read_count(keys, *_EXPERTS, default=128),
            expert_width=keys.integer("moe_intermediate_size", 768),
            top_k=keys.integer("num_experts_per_tok", 8),
            router=Softmax(renormalise=keys.flag("norm_topk_prob", False)),
        )
        step, dense_layers = keys.integer("decoder_sparse_step", 1), keys.items("mlp_only_layers")
        if step < 1:
            raise ValueError(f"config.json: decoder_sparse_step must be at least 1, not {step}")
        layers = tuple(
            PreNorm(mixer, moe)
            if moe.experts and (i + 1) % step == 0 and i not in (dense_layers or ())
            else PreNorm(mixer, first)
            for i in range(keys.integer("num_hidden_layers"))
        )
        return Imported(read_model(keys, layers, eps=1e-6), keys.integer("vocab_size"))

    def write_config(self, model: ModelConfig, vocab: int, wanted: Wanted) -> dict[str, Any]:
        no, target = Refusals(self.model_type), wanted.target
        no.ends(model)
        layers = no.prenorms(model)
        mixers, ffns = [layer.mixer for layer in layers], [layer.ffn for layer in layers]
        no.only(mixers, MIXER, GQA, SWA)
        no.only(ffns, FFN, Dense, MoE)
        mixer = no.one(mixers, MIXER)
        first, moe = no.the(ffns, FFN, Dense), no.the(ffns, FFN, MoE)
        if isinstance(mixer, GQA | SWA):
            refuse_attention(no, mixer, "head", target)
            refuse_alpha(no, mixer)
            _refuse_served(no, mixer, target)
        if first is not None:
            no.unless(not first.bias, f"{FFN}.bias", "it has none")
        chosen = None if moe is None else refuse_mixture(no, moe)
        no.unless(moe is not None, FFN, "it needs a mixture of experts in some layer")
        no.check()
        assert isinstance(mixer, GQA | SWA) and moe and chosen
        window = mixer.window if isinstance(mixer, SWA) else None
        return {
            "vocab_size": vocab,
            "hidden_size": model.width,
            "intermediate_size": first.hidden if first else moe.expert_width,
            "num_hidden_layers": len(layers),
            **write_attention(mixer),
            "hidden_act": "silu",
            "max_position_embeddings": wanted.context,
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": tied_for(model, target),
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": len(layers) if window is None else 0,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, ffn in enumerate(ffns) if isinstance(ffn, Dense)],
            "moe_intermediate_size": moe.expert_width,
            "num_experts_per_tok": moe.top_k,
            **dict.fromkeys(_EXPERTS, moe.experts),
            "norm_topk_prob": chosen.renormalise,
        }

    def layouts(self, model: ModelConfig, vocab: int, target: Target | None) -> tuple[Layout, ...]:
        tied = tied_for(model, target)
        # Published and saved folders have tensors for each expert, memory has fused ones.
        kinds = (False, True) if target is None else (False,)
        return tuple(_layout(model, vocab, tied, fused) for fused in kinds)


def _read_attention(keys: Keys) -> Attention:
    base, scaling = read_plain_rope(keys)
    heads = keys.integer("num_attention_heads")
    mixer = GQA(
        heads=heads,
        kv_heads=keys.integer("num_key_value_heads", 4),
        head_width=keys.integer("head_dim", keys.integer("hidden_size") // heads),
        rope_base=base,
        rope_scaling=scaling,
        qk_norm="head",
        bias=keys.flag("attention_bias", False),
    )
    if not keys.flag("use_sliding_window", False):
        keys.integer_or_none("sliding_window")
        keys.integer_or_none("max_window_layers")
        return mixer
    window = keys.integer("sliding_window", 4096)
    why = "transformers lets all layers slide, other loaders only those from this one on"
    keys.must("max_window_layers", None, 0, why=why)
    values = {field.name: getattr(mixer, field.name) for field in dataclasses.fields(GQA)}
    return SWA(**values, window=window)


def _refuse_served(no: Refusals, mixer: Attention, target: Target) -> None:
    """What vLLM's and SGLang's classes leave out."""
    if target == "transformers":
        return
    no.unless(not mixer.bias, f"{MIXER}.bias", f"{target} has none on the output projection")
    no.unless(isinstance(mixer, GQA), MIXER, f"{target} has no window here")


def _layout(model: ModelConfig, vocab: int, tied: bool, fused: bool) -> Layout:
    D, each = model.width, fused_experts if fused else experts
    entries = list[Entry](ends(model, vocab, tied))
    for ours, theirs, layer in each_layer(model):
        entries += attention(ours, theirs, layer, D)
        ffn, places = layer.ffn, (f"{ours}.ffn", f"{theirs}.mlp")
        if isinstance(ffn, Dense):
            entries += dense(*places, ffn, D)
            continue
        assert isinstance(ffn, MoE)
        entries += router(places[0], f"{places[1]}.gate", ffn, D)
        entries += each(places[0], f"{places[1]}.experts", ffn, D)
    return finished(entries, tied)
