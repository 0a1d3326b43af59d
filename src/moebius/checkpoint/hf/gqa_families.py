"""What Llama, Qwen3-MoE, OLMoE, Hunyuan and gpt-oss share: pre-norm layers of grouped-query
attention, and mixtures whose router is a softmax.

Keys of a config.json, refusals, and maps of tensors. Letters: D model width, F hidden width, E
experts.
"""

from typing import Any, Final

from moebius.checkpoint.hf import Target
from moebius.checkpoint.hf.keys import Keys
from moebius.checkpoint.hf.layout import Entry, Layout
from moebius.checkpoint.hf.pieces import biased_rules, gqa, norms, rules, usual_drops, whole
from moebius.checkpoint.hf.refusals import Refusals
from moebius.checkpoint.hf.rope import write_rope
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA, QKNorm
from moebius.model.mixers.swa import SWA
from moebius.model.rope import NTKAlpha, YaRN

Attention = GQA | SWA

MIXER: Final = "layers.*.mixer"
FFN: Final = "layers.*.ffn"

# --- reading --------------------------------------------------------------------------------------


def read_count(keys: Keys, *names: str, default: int) -> int:
    """A whole number that goes by several names, which have to agree."""
    found = next((keys.integer(name) for name in names if keys.has(name)), default)
    for name in names:
        keys.must(name, found, None, why=f"{' and '.join(names)} are one number, here {found}")
    return found


def read_model(keys: Keys, layers: tuple[PreNorm, ...], eps: float) -> ModelConfig:
    """The model of these layers; `eps` is the default of its norms."""
    tied = keys.flag("tie_word_embeddings", False)
    return ModelConfig(
        width=keys.integer("hidden_size"),
        layers=layers,
        tied=tied,
        embedding_scale=1.0 if tied else None,
        norm_eps=keys.number("rms_norm_eps", eps),
    )


# --- refusing -------------------------------------------------------------------------------------


def refuse_attention(
    no: Refusals, mixer: Attention, qk_norm: QKNorm, target: Target, *, sinks: bool = False
) -> None:
    """What a class with this QK-norm, and sinks or none, cannot do."""
    has = "no QK-norm" if qk_norm == "none" else f"only QK-norm {qk_norm!r}"
    no.unless(mixer.qk_norm == qk_norm, f"{MIXER}.qk_norm", f"it has {has}")
    always = "it has them in every layer" if sinks else "it has none"
    no.unless(mixer.sinks == sinks, f"{MIXER}.sinks", always)
    no.unless(mixer.rope_base is not None, f"{MIXER}.rope_base", "it always rotates")
    scaling = mixer.rope_scaling
    if target != "transformers" and isinstance(scaling, YaRN):
        # Servers read neither key of a plain YaRN, and would stretch by the factor alone.
        plain = scaling.attention_factor is scaling.mscale is scaling.mscale_all_dim is None
        why = f"{target} has neither attention_factor nor mscale here"
        no.unless(plain, f"{MIXER}.rope_scaling", why)


def refuse_alpha(no: Refusals, mixer: Attention) -> None:
    """Hunyuan's scaling, which other classes would take for one that follows the length."""
    there = f"{MIXER}.rope_scaling"
    no.unless(not isinstance(mixer.rope_scaling, NTKAlpha), there, "only Hunyuan has ntk_alpha")


def refuse_mixture(
    no: Refusals, moe: MoE, *, shared: int = 0, bias: bool = False, clamped: bool = False
) -> Softmax | None:
    """What a mixture with so many shared experts, biases or none, cannot do; its router."""
    has = f"it has {shared or 'none'}"
    no.unless(moe.shared_experts == shared, f"{FFN}.shared_experts", has)
    no.unless(not moe.zero_experts, f"{FFN}.zero_experts", "it has none")
    no.unless(moe.scaling * moe.split == 1.0, f"{FFN}.scaling", "it does not scale the routed sum")
    no.unless(moe.bias == bias, f"{FFN}.bias", f"its experts {'always' if bias else 'never'} have")
    has = "its experts are clamped" if clamped else "its experts are plain SwiGLUs"
    no.unless((moe.clamp is not None) == clamped, f"{FFN}.clamp", has)
    why = "a rule holds a selection bias, for which it has no place"
    no.unless(not biased_rules(moe), f"{FFN}.balance", why)
    router = no.kind(moe.router, Softmax, f"{FFN}.router")
    if router is not None:
        free = router.num_groups == router.top_groups
        no.unless(free, f"{FFN}.router.num_groups", "it selects among all experts")
        has = "it always has one" if bias else "it has none"
        no.unless(router.bias == bias, f"{FFN}.router.bias", has)
    return router


# --- writing --------------------------------------------------------------------------------------


def write_attention(mixer: Attention) -> dict[str, Any]:
    """The keys of grouped-query attention, rotary positions included."""
    assert mixer.rope_base is not None
    return {
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_width,
        "attention_bias": mixer.bias,
        "attention_dropout": 0.0,
        **write_rope(mixer.rope_base, mixer.rope_scaling),
    }


# --- mapping --------------------------------------------------------------------------------------


def attention(
    ours: str,
    theirs: str,
    layer: PreNorm,
    width: int,
    qk_norms: tuple[str, str] = ("q_norm", "k_norm"),
) -> tuple[Entry, ...]:
    """The two norms of a layer and its attention."""
    full = layer.mixer.without_window() if isinstance(layer.mixer, SWA) else layer.mixer
    assert isinstance(full, GQA)
    heads = gqa(f"{ours}.mixer", f"{theirs}.self_attn", full, width, qk_norms=qk_norms)
    return (*norms(ours, theirs, width), *heads)


def router(ours: str, theirs: str, moe: MoE, width: int) -> tuple[Entry, ...]:
    """The router, named in full on their side but for `.weight`, and the memory of its rules."""
    entries = (whole(f"{ours}.router.w_ED", f"{theirs}.weight", moe.experts, width),)
    if isinstance(moe.router, Softmax) and moe.router.bias:
        entries += (whole(f"{ours}.router.b_E", f"{theirs}.bias", moe.experts),)
    assert not biased_rules(moe)
    return entries + rules(ours, theirs, moe)


def finished(entries: list[Entry], tied: bool, exact: tuple[str, ...] = ()) -> Layout:
    """The layout, and what a folder may hold besides."""
    return Layout(tuple(entries), tuple(usual_drops(tied)), exact=exact)
