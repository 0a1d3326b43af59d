"""gpt-oss (OpenAI, 2508.10925): sliding and full attention in turns, both with sinks, and experts
with biases and a clamped SwiGLU, chosen by a softmax over the selected logits.

Their experts are [E, D, 2F] with the columns of gate and up in turns. Published ones are MXFP4,
which an import makes bf16 under the same names. Letters: D model width, F hidden width, E experts.
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
from moebius.checkpoint.hf.layout import Chain, Entry, EvenOdd, Layout, Piece, Transposed, Turn
from moebius.checkpoint.hf.pieces import each_layer, ends, tied_for
from moebius.checkpoint.hf.refusals import Refusals
from moebius.checkpoint.hf.rope import read_plain_rope
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.moe import Clamp, MoE
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.swa import SWA
from moebius.model.rope import RopeScaling, YaRN

SLIDING, FULL = "sliding_attention", "full_attention"
# What a config without any positions means.
_BASE: Final = 150_000.0
_SCALING: Final = YaRN(factor=32.0, original_length=4096, truncate=False)
# vLLM reads none of these from the config.
_SERVED_EPS: Final = 1e-5
_SERVED_CLAMP: Final = Clamp(alpha=1.702, limit=7.0)


@final
@dataclasses.dataclass(frozen=True)
class GptOss(Family):
    """`GptOssForCausalLM`."""

    model_type: ClassVar[str] = "gpt_oss"
    architecture: ClassVar[str] = "GptOssForCausalLM"
    # Repeats the length within the positions.
    harmless: ClassVar[frozenset[str]] = frozenset(("initial_context_length",))

    def read_config(self, keys: Keys) -> Imported:
        # This class names a SiLU, but its experts are clamped whatever the key says.
        keys.must("hidden_act", "silu", why="the experts are clamped SwiGLUs")
        full, sliding = _read_attention(keys)
        alpha = keys.number("swiglu_alpha", 1.702)
        keys.must("hidden_act_alpha", alpha, None, why=f"swiglu_alpha is {alpha}")
        moe = MoE(
            experts=read_count(keys, "num_local_experts", "num_experts", default=128),
            expert_width=keys.integer("intermediate_size", 2880),
            top_k=read_count(keys, "num_experts_per_tok", "experts_per_token", default=4),
            router=Softmax(renormalise=True, bias=True),
            bias=True,
            clamp=Clamp(alpha, keys.number("swiglu_limit", 7.0)),
        )
        kinds = {SLIDING: PreNorm(sliding, moe), FULL: PreNorm(full, moe)}
        layers = tuple(kinds[kind] for kind in _read_kinds(keys))
        return Imported(read_model(keys, layers, eps=1e-5), keys.integer("vocab_size"))

    def write_config(self, model: ModelConfig, vocab: int, wanted: Wanted) -> dict[str, Any]:
        no, target = Refusals(self.model_type), wanted.target
        no.ends(model)
        layers = no.prenorms(model)
        mixers, ffns = [layer.mixer for layer in layers], [layer.ffn for layer in layers]
        no.only(mixers, MIXER, GQA, SWA)
        no.only(ffns, FFN, MoE)
        sliding = no.the(mixers, MIXER, SWA)
        fulls = [mixer.without_window() if isinstance(mixer, SWA) else mixer for mixer in mixers]
        full = no.one(fulls, f"{MIXER}, but for the window")
        moe = no.the(ffns, FFN, MoE)
        if isinstance(full, GQA):
            refuse_attention(no, full, "none", target, sinks=True)
            refuse_alpha(no, full)
        chosen = None if moe is None else refuse_mixture(no, moe, bias=True, clamped=True)
        if chosen is not None:
            why = "its weights are a softmax over the selected logits"
            no.unless(chosen.renormalise, f"{FFN}.router.renormalise", why)
        kinds = [SLIDING if isinstance(mixer, SWA) else FULL for mixer in mixers]
        if isinstance(full, GQA) and moe is not None:
            _refuse_served(no, model, full, moe, kinds, target)
        no.check()
        assert isinstance(full, GQA) and moe and moe.clamp
        return {
            "vocab_size": vocab,
            "hidden_size": model.width,
            "intermediate_size": moe.expert_width,
            "num_hidden_layers": len(layers),
            **write_attention(full),
            # Loaders want a number even where no layer slides.
            "sliding_window": sliding.window if sliding else wanted.context,
            "layer_types": kinds,
            "hidden_act": "silu",
            "max_position_embeddings": wanted.context,
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": tied_for(model, target),
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "swiglu_alpha": moe.clamp.alpha,
            # SGLang's name for it.
            "hidden_act_alpha": moe.clamp.alpha,
            "swiglu_limit": moe.clamp.limit,
        }

    def layouts(self, model: ModelConfig, vocab: int, target: Target | None) -> tuple[Layout, ...]:
        D, tied = model.width, tied_for(model, target)
        entries = list[Entry](ends(model, vocab, tied))
        for ours, theirs, layer in each_layer(model):
            assert isinstance(layer.ffn, MoE)
            entries += attention(ours, theirs, layer, D)
            entries += router(f"{ours}.ffn", f"{theirs}.mlp.router", layer.ffn, D)
            entries += _experts(f"{ours}.ffn", f"{theirs}.mlp.experts", layer.ffn, D)
        return (finished(entries, tied),)


def _read_attention(keys: Keys) -> tuple[GQA, SWA]:
    """Full attention, and the same in a window."""
    base, scaling = _read_rope(keys)
    heads = keys.integer("num_attention_heads")
    full = GQA(
        heads=heads,
        kv_heads=keys.integer("num_key_value_heads", 8),
        head_width=keys.integer("head_dim", 64),
        rope_base=base,
        rope_scaling=scaling,
        bias=keys.flag("attention_bias", True),
        sinks=True,
    )
    window = keys.integer("sliding_window", 128)
    values = {field.name: getattr(full, field.name) for field in dataclasses.fields(GQA)}
    return full, SWA(**values, window=window)


def _read_rope(keys: Keys) -> tuple[float, RopeScaling | None]:
    stretched = keys.has("rope_scaling") or keys.has("rope_parameters")
    base, scaling = read_plain_rope(keys, _BASE)
    return base, scaling if stretched else _SCALING


def _read_kinds(keys: Keys) -> list[str]:
    """The kind of attention of each layer; absent, they take turns, a sliding one first."""
    count, found = keys.integer("num_hidden_layers"), keys.items("layer_types")
    if found is None:
        return [FULL if i % 2 else SLIDING for i in range(count)]
    if len(found) != count or not set(found) <= {SLIDING, FULL}:
        raise ValueError(
            f"config.json: layer_types must say {SLIDING} or {FULL} for each of the {count} layers"
        )
    return found


def _refuse_served(
    no: Refusals, model: ModelConfig, full: GQA, moe: MoE, kinds: list[str], target: Target
) -> None:
    """What vLLM does not read from the config."""
    if target != "vllm":
        return
    yarn = isinstance(full.rope_scaling, YaRN)
    no.unless(yarn, f"{MIXER}.rope_scaling", "vllm always has yarn here")
    no.unless(full.bias, f"{MIXER}.bias", "vllm always has them here")
    turns = kinds == [FULL if i % 2 else SLIDING for i in range(len(kinds))]
    no.unless(turns, MIXER, "vllm lets every other layer slide, from the first on")
    eps = f"vllm always takes {_SERVED_EPS}"
    no.unless(model.norm_eps == _SERVED_EPS, "norm_eps", eps)
    no.unless(moe.clamp == _SERVED_CLAMP, f"{FFN}.clamp", "vllm always takes alpha 1.702, limit 7")


def _experts(ours: str, theirs: str, moe: MoE, width: int) -> tuple[Entry, ...]:
    """Weights and biases of the experts, expert by expert."""
    E, F = moe.experts, moe.expert_width
    rows = EvenOdd()
    both, flipped = Chain(Transposed(), rows), Transposed()
    return (
        _by_expert(f"{ours}.w_gate_up_E2FD", (2 * F, width), f"{theirs}.gate_up_proj", E, both),
        _by_expert(f"{ours}.w_down_EDF", (width, F), f"{theirs}.down_proj", E, flipped),
        _by_expert(f"{ours}.b_gate_up_E2F", (2 * F,), f"{theirs}.gate_up_proj_bias", E, rows),
        Entry(f"{ours}.b_down_ED", (E, width), (Piece(f"{theirs}.down_proj_bias", (E, width)),)),
    )


def _by_expert(ours: str, shape: tuple[int, ...], theirs: str, count: int, turn: Turn) -> Entry:
    """One tensor for all experts on both sides, turned within each; matrices change their dims."""
    whole = (count, *shape[::-1])
    pieces = (Piece(theirs, whole, at=(e,), part=e, turn=turn) for e in range(count))
    return Entry(ours, (count, *shape), tuple(pieces))
