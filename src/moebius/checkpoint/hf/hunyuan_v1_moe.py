"""Hunyuan's mixture (`hunyuan_v1_moe`, Hunyuan-A13B): GQA with heads normed after the rotation, a
shared expert as wide as the routed ones, a softmax router.

Hunyuan-Large has no place here: its layers share keys and values in pairs (CLA), and its one expert
is weighted by its score, which this class renormalises to 1. Letters: D model width.
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
    refuse_attention,
    refuse_mixture,
    router,
    write_attention,
)
from moebius.checkpoint.hf.keys import Keys
from moebius.checkpoint.hf.layout import Entry, Layout
from moebius.checkpoint.hf.pieces import (
    each_layer,
    ends,
    experts,
    exports_tied,
    fused_experts,
    swiglu,
)
from moebius.checkpoint.hf.refusals import Refusals
from moebius.checkpoint.hf.rope import read_rope
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA

_NORMS: Final = ("query_layernorm", "key_layernorm")
# The released classes compute the router in fp32, from weights stored so.
_EXACT: Final = (r".*\.mlp\.gate\.wg\.weight",)
# What configs of the released code say beside: ids of tokens, vision, heads for classification,
# capacities in training. `cla_share_factor` means nothing while `use_cla` is false.
_HARMLESS: Final = """
    eod_token_id pad_id im_start_id im_end_id im_newline_id text_start_id text_end_id image_token_id
    video_start_id video_end_id mask_init_id org_vocab_size num_media_embeds class_num dense_list
    add_classification_head pool_type skip_cls_token vit_path vit_type vit_input_resolution
    vit_token vit_patch vit_mapping_type vit_norm_type vit_used_rms_norm vit_remove_prenorm
    vit_add_patchemb_bias anyres_vit_max_image_size anyres_pooling_size anyres_vit_two_views
    cla_share_factor moe_random_routing_dropped_token xdrope_section
"""


@final
@dataclasses.dataclass(frozen=True)
class HunYuanMoEV1(Family):
    """`HunYuanMoEV1ForCausalLM`."""

    model_type: ClassVar[str] = "hunyuan_v1_moe"
    architecture: ClassVar[str] = "HunYuanMoEV1ForCausalLM"
    harmless: ClassVar[frozenset[str]] = frozenset(_HARMLESS.split())
    explicit: ClassVar[frozenset[str]] = frozenset({"head_dim", "num_experts"})

    def read_config(self, keys: Keys) -> Imported:
        _read_what_must_be(keys)
        width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
        base, scaling = read_rope(keys)
        mixer = GQA(
            heads=heads,
            kv_heads=keys.integer("num_key_value_heads", heads),
            head_width=read_count(keys, "head_dim", "attention_head_dim", default=width // heads),
            rope_base=base,
            rope_scaling=scaling,
            qk_norm="head_after_rope",
            bias=keys.flag("attention_bias", False),
        )
        count, hidden = keys.integer("num_hidden_layers"), keys.integer("intermediate_size", 11008)
        one = "every expert of every layer is as wide as the shared one"
        _must_be(keys, "moe_intermediate_size", hidden, count, one)
        _must_be(keys, "num_shared_expert", 1, count, "every layer has one shared expert")
        sizes = set(_by_layer(keys, count, "num_experts", "num_local_experts"))
        if len(sizes) != 1:
            raise ValueError("config.json: num_experts must be the same in all layers")
        (number,), router = sizes, Softmax(renormalise=True)
        layers = tuple(
            PreNorm(mixer, MoE(number, hidden, top_k, shared_experts=1, router=router))
            for top_k in _by_layer(keys, count, "moe_topk", "num_experts_per_tok")
        )
        return Imported(read_model(keys, layers, eps=1e-5), keys.integer("vocab_size"))

    def write_config(self, model: ModelConfig, vocab: int, wanted: Wanted) -> dict[str, Any]:
        no = Refusals(self.model_type)
        no.ends(model)
        layers = no.prenorms(model)
        no.only([layer.mixer for layer in layers], MIXER, GQA)
        no.only([layer.ffn for layer in layers], FFN, MoE)
        mixer = no.one([layer.mixer for layer in layers], MIXER)
        moes = [layer.ffn for layer in layers if isinstance(layer.ffn, MoE)]
        counts = [moe.top_k for moe in moes]
        moe = no.one([dataclasses.replace(moe, top_k=1) for moe in moes], f"{FFN}, but for top_k")
        if isinstance(mixer, GQA):
            refuse_attention(no, mixer, "head_after_rope", wanted.target)
        if moe is not None:
            _refuse_router(no, refuse_mixture(no, moe, shared=1), counts, wanted.target)
        no.check()
        assert isinstance(mixer, GQA) and moe
        return {
            "vocab_size": vocab,
            "hidden_size": model.width,
            "intermediate_size": moe.expert_width,
            "moe_intermediate_size": moe.expert_width,
            "num_hidden_layers": len(layers),
            **write_attention(mixer),
            "attention_head_dim": mixer.head_width,
            "hidden_act": "silu",
            "max_position_embeddings": wanted.context,
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": exports_tied(model),
            "num_experts": moe.experts,
            "moe_topk": counts[0] if len(set(counts)) == 1 else counts,
            # vLLM and SGLang take no shared expert and no norm where these are absent.
            "num_shared_expert": 1,
            "use_mixed_mlp_moe": True,
            "use_qk_norm": True,
            "use_cla": False,
            "norm_topk_prob": True,
        }

    def layouts(self, model: ModelConfig, vocab: int, target: Target | None) -> tuple[Layout, ...]:
        # Published and saved folders have tensors for each expert, memory has fused ones.
        kinds = (False, True) if target is None else (False,)
        return tuple(_layout(model, vocab, fused) for fused in kinds)


def _read_what_must_be(keys: Keys) -> None:
    """The keys of the released code that the class answers in one way only."""
    keys.must("hidden_act", "silu", why="the feed-forwards are SwiGLUs")
    keys.must("use_cla", False, None, why="this class has keys and values in every layer")
    keys.must("use_mla", False, None, why="this class has no latent attention")
    for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"):
        keys.must(name, None, why="this class has no latent attention")
    keys.must("v_head_dim", None, why="this class has no latent attention")
    keys.must("use_qk_norm", True, None, why="this class always norms queries and keys")
    keys.must("use_rotary_pos_emb", True, None, why="this class always rotates")
    keys.must("position_embedding_xdrope", False, None, why="positions are of one dimension")
    keys.must("sliding_window", None, why="this class has no window")
    keys.must("use_mixed_mlp_moe", True, None, why="this class always has a shared expert")
    keys.must("moe_layer_num_skipped", 0, None, why="this class has no dense layers")
    keys.must("moe_drop_tokens", False, None, why="this class drops no tokens")
    keys.must("norm_topk_prob", True, None, why="this class renormalises the selected weights")
    # The released code says false for no scaling, and for no groups.
    why = "this class does not scale the routed sum"
    keys.must("routed_scaling_factor", False, None, 1.0, why=why)
    for name in ("group_limited_greedy", "n_group", "topk_group"):
        keys.must(name, False, None, why="this class selects among all experts")
    keys.must("mlp_bias", False, None, why="the feed-forwards have no biases")
    keys.must("norm_type", "rms", None, why="norms are RMSNorm")


def _by_layer(keys: Keys, count: int, *names: str) -> list[int]:
    """A number that is one for all layers or one for each, under any of its names."""
    return keys.integers(next((x for x in names if keys.has(x)), names[0]), count, 1)


def _must_be(keys: Keys, name: str, value: int, count: int, why: str) -> None:
    """Take a key that repeats one number, for all layers or for each."""
    if set(keys.integers(name, count, value)) != {value}:
        raise ValueError(f"config.json: {name} must be {value}: {why}")


def _refuse_router(no: Refusals, chosen: Softmax | None, counts: list[int], target: Target) -> None:
    if chosen is None:
        return
    why = "it divides the selected weights by their sum (one expert then weighs 1)"
    no.unless(chosen.renormalise, f"{FFN}.router.renormalise", why)
    if target != "transformers":
        why = f"{target} does not renormalise the weight of a single expert"
        no.unless(min(counts) > 1, f"{FFN}.top_k", why)


def _layout(model: ModelConfig, vocab: int, fused: bool) -> Layout:
    D, each = model.width, fused_experts if fused else experts
    entries = list[Entry](ends(model, vocab))
    for ours, theirs, layer in each_layer(model):
        moe = layer.ffn
        assert isinstance(moe, MoE)
        shared = (f"{ours}.ffn.shared_gate_up", f"{ours}.ffn.shared_down")
        entries += attention(ours, theirs, layer, D, _NORMS)
        entries += router(f"{ours}.ffn", f"{theirs}.mlp.gate.wg", moe, D)
        entries += swiglu(*shared, f"{theirs}.mlp.shared_mlp", moe.expert_width, D)
        entries += each(f"{ours}.ffn", f"{theirs}.mlp.experts", moe, D)
    return finished(entries, exports_tied(model), _EXACT)
