"""Kimi Linear (arXiv 2510.26692): layers of delta attention and of latent attention without
positions, DeepSeek-V3's mixtures after the first layers.

Published folders call a mixture `block_sparse_moe` and a dense FFN `mlp`; transformers 5.23 saves
both under the first name and has names of its own in memory. All three are read, the first is
written, which every loader takes. Letters: D model width, H heads, K head width, W conv width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Final, final

from moebius.checkpoint.hf import Family, Imported, Target, Wanted
from moebius.checkpoint.hf.keys import Keys
from moebius.checkpoint.hf.layout import Entry, Layout, Piece, Shaped
from moebius.checkpoint.hf.mla_families import (
    EXACT,
    MoENames,
    left_out_ends,
    maybe_empty,
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
    unbiased,
    whole,
)
from moebius.checkpoint.hf.refusals import Refusals
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn import FeedForwardConfig
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.lm import ModelConfig
from moebius.model.mixers import MixerConfig
from moebius.model.mixers.kda import KDA
from moebius.model.mixers.mla import MLA

NAMES = MoENames(
    experts="num_experts",
    top_k="num_experts_per_token",
    shared="num_shared_experts",
    groups="num_expert_group",
    renormalise="moe_renormalize",
)
_PAD: Final = 163_839
LINEAR, FULL = "linear_attention", "full_attention"
# What a config says of delta attention where no layer has it: the released model's numbers.
_NO_KDA: Final = KDA(heads=32, head_width=128)


@final
@dataclasses.dataclass(frozen=True)
class KimiLinear(Family):
    """`KimiLinearForCausalLM`."""

    model_type: ClassVar[str] = "kimi_linear"
    architecture: ClassVar[str] = "KimiLinearForCausalLM"
    # Nothing rotates, so no length and no base matters.
    harmless: ClassVar[frozenset[str]] = frozenset(
        (
            *("head_dim", "model_max_length", "max_position_embeddings", "rope_theta"),
            *("num_nextn_predict_layers", "use_grouped_topk"),
        )
    )

    def read_config(self, keys: Keys) -> Imported:
        keys.must("hidden_act", "silu", why="the feed-forwards are SwiGLUs")
        keys.must("moe_router_activation_func", "sigmoid", why="Kimi Linear scores by sigmoid")
        keys.must("moe_layer_freq", 1, why="every layer after the first ones is a mixture")
        keys.must("mla_use_nope", True, why="its latent attention does not rotate")
        keys.must("rope_scaling", None, why="its latent attention does not rotate")
        # transformers has no tying for it: the head would stay random.
        keys.must("tie_word_embeddings", False, why="embedding and head are two tensors")
        layers = keys.integer("num_hidden_layers")
        linear, kinds = _read_linear(keys, layers)
        latent = read_mla(keys, keys.integer_or_none("q_lora_rank"), base=None, scaling=None)
        mixers: dict[str, MixerConfig] = {LINEAR: linear, FULL: latent}
        first = Dense(keys.integer("intermediate_size", 9216))
        moe = read_moe(keys, NAMES, width=1024, scaling=2.446, groups=1, top=1)
        k = keys.integer("first_k_dense_replace", 1)
        usual = ["dense" if i < k else "sparse" for i in range(layers)]
        ffns: dict[str, FeedForwardConfig] = {"dense": first, "sparse": moe}
        ffn_kinds = _listed(keys, "mlp_layer_types", layers, usual, ffns)
        pairs = zip(kinds, ffn_kinds, strict=True)
        model = ModelConfig(
            width=keys.integer("hidden_size"),
            layers=tuple(PreNorm(mixers[kind], ffns[ffn]) for kind, ffn in pairs),
            norm_eps=keys.number("rms_norm_eps", 1e-5),
        )
        return Imported(model, keys.integer("vocab_size"))

    def write_config(self, model: ModelConfig, vocab: int, wanted: Wanted) -> dict[str, Any]:
        no, target = Refusals(self.model_type), wanted.target
        refuse_ends_but_mtp(no, model)
        layers = no.prenorms(model)
        mixers, ffns = [layer.mixer for layer in layers], [layer.ffn for layer in layers]
        no.only(mixers, "layers.*.mixer", KDA, MLA)
        no.only(ffns, "layers.*.ffn", Dense, MoE)
        linear = no.the(mixers, "layers.*.mixer", KDA)
        latent = no.the(mixers, "layers.*.mixer", MLA)
        first, moe = no.the(ffns, "layers.*.ffn", Dense), no.the(ffns, "layers.*.ffn", MoE)
        k = next((i for i, ffn in enumerate(ffns) if isinstance(ffn, MoE)), len(ffns))
        no.unless(k < len(ffns), "layers.*.ffn", "it needs a mixture of experts in some layer")
        # transformers' cache takes its length from a layer of attention.
        no.unless(any(isinstance(x, MLA) for x in mixers), "layers.*.mixer", "it needs one mla")
        if linear:
            _refuse_linear(no, linear)
        if latent:
            _refuse_latent(no, latent, model, target)
        if first:
            no.unless(not first.bias, "layers.*.ffn.bias", "it has none")
        if moe:
            _refuse_moe(no, moe, ffns[k:], target)
        no.check()
        assert moe and latent
        return {
            "vocab_size": vocab,
            "hidden_size": model.width,
            "intermediate_size": first.hidden if first else moe.expert_width,
            "num_hidden_layers": len(layers),
            **_write_linear(linear or _NO_KDA, mixers),
            "mlp_layer_types": ["dense" if isinstance(x, Dense) else "sparse" for x in ffns],
            "first_k_dense_replace": k,
            "moe_layer_freq": 1,
            **write_mla(latent),
            "mla_use_nope": True,
            **write_moe(NAMES, moe, target),
            "use_grouped_topk": True,
            "moe_router_activation_func": "sigmoid",
            "hidden_act": "silu",
            "model_max_length": wanted.context,
            # And no rope_scaling, of which transformers 5 warns. The base is read, never used.
            "rope_theta": 10_000.0,
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": False,
            "num_nextn_predict_layers": 0,
            # transformers' default lies outside smaller vocabularies, which it then refuses.
            **({} if vocab > _PAD else {"pad_token_id": None}),
        }

    def layouts(self, model: ModelConfig, vocab: int, target: Target | None) -> tuple[Layout, ...]:
        if target is not None:
            return (_layout(model, vocab, _PUBLISHED, empty=target == "transformers"),)
        names = (_PUBLISHED, _SAVED, _IN_MEMORY)
        empties = maybe_empty(layer.ffn for layer in model.layers if isinstance(layer, PreNorm))
        return tuple(
            _layout(model, vocab, each, empty=empty) for each in names for empty in empties
        )


# --- the pattern ----------------------------------------------------------------------------------


def _read_linear(keys: Keys, layers: int) -> tuple[KDA, list[str]]:
    """Delta attention, and the kind of each layer's mixer; as in transformers, the object's numbers
    win over those outside, `layer_types` over the object's lists."""
    heads, width = keys.integer("linear_num_heads", 32), keys.integer("linear_head_dim", 128)
    conv = keys.integer("linear_conv_kernel_dim", 4)
    usual = [FULL if i and i % 4 == 0 else LINEAR for i in range(layers)]
    inside = keys.below("linear_attn_config")
    if inside is not None:
        heads, width = inside.integer("num_heads", heads), inside.integer("head_dim", width)
        conv = inside.integer("short_conv_kernel_size", conv)
        inside.must("gate_lower_bound", None, why="transformers' class has no such bound")
        full, kda = inside.items("full_attn_layers"), inside.items("kda_layers")
        inside.finish()
        if full is not None and kda is not None:
            if sorted([*full, *kda], key=str) != sorted(range(1, layers + 1), key=str):
                raise ValueError(
                    "config.json: full_attn_layers and kda_layers must share out the layers 1.."
                    f"{layers}, each once"
                )
            usual = [FULL if i in full else LINEAR for i in range(1, layers + 1)]
    return KDA(heads, width, conv), _listed(keys, "layer_types", layers, usual, (LINEAR, FULL))


def _listed(keys: Keys, name: str, layers: int, usual: list[str], known: Any) -> list[str]:
    """A kind for each layer."""
    found = keys.items(name) or usual
    if len(found) != layers or any(kind not in known for kind in found):
        raise ValueError(f"config.json: {name} must have {layers} items of {', '.join(known)}")
    return found


def _write_linear(linear: KDA, mixers: Sequence[MixerConfig]) -> dict[str, Any]:
    """The keys of `_read_linear`; transformers' default pattern is not the released model's."""
    numbered = list(enumerate(mixers, 1))
    return {
        "linear_attn_config": {
            "full_attn_layers": [i for i, mixer in numbered if isinstance(mixer, MLA)],
            "kda_layers": [i for i, mixer in numbered if isinstance(mixer, KDA)],
            "num_heads": linear.heads,
            "head_dim": linear.head_width,
            "short_conv_kernel_size": linear.conv_width,
        },
        "layer_types": [FULL if isinstance(mixer, MLA) else LINEAR for mixer in mixers],
    }


# --- refusing -------------------------------------------------------------------------------------


def _refuse_linear(no: Refusals, linear: KDA) -> None:
    where = "layers.*.mixer"
    no.unless(linear.lower_bound is None, f"{where}.lower_bound", "its decay has no bound")
    why = "its corrections do not overshoot"
    no.unless(not linear.negative_eigenvalues, f"{where}.negative_eigenvalues", why)


def _refuse_latent(no: Refusals, latent: MLA, model: ModelConfig, target: Target) -> None:
    where, served = "layers.*.mixer", target != "transformers"
    refuse_mla(no, latent, model, target, where)
    no.unless(not latent.scale_correction, f"{where}.scale_correction", "it has none")
    no.unless(latent.rope_base is None, f"{where}.rope_base", "it does not rotate; set it to none")
    plain = latent.q_rank is None or not served
    no.unless(plain, f"{where}.q_rank", f"{target} has no latent for its queries")


def _refuse_moe(no: Refusals, moe: MoE, after: list[FeedForwardConfig], target: Target) -> None:
    where, served = "layers.*.ffn", target != "transformers"
    refuse_sigmoid_moe(no, moe, where)
    if served:
        leading = all(isinstance(ffn, MoE) for ffn in after)
        no.unless(leading, where, f"{target} has dense layers before all mixtures only")
        no.unless(moe.shared_experts > 0, f"{where}.shared_experts", f"{target} needs one")


# --- mapping --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Names:
    """What a kind of folder calls things, below a layer."""

    dense: str
    moe: str
    # What stands before the decay's tensors.
    gate: str
    # One tensor for the three convolutions; one for all experts.
    fused: bool


_PUBLISHED = _Names("mlp", "block_sparse_moe", "", False)
_SAVED = _Names("block_sparse_moe", "block_sparse_moe", "", False)
_IN_MEMORY = _Names("mlp", "mlp", "forget_gate.", True)


def _layout(model: ModelConfig, vocab: int, names: _Names, *, empty: bool) -> Layout:
    D = model.width
    # Never tied: of a tied model of ours both tensors are written.
    entries = [*ends(model, vocab, tied=False), *left_out_ends(model, vocab)]
    filled = []
    for ours, theirs, layer in each_layer(model):
        entries += norms(ours, theirs, D)
        if isinstance(layer.mixer, KDA):
            entries += _kda(f"{ours}.mixer", f"{theirs}.self_attn", layer.mixer, D, names)
        else:
            assert isinstance(layer.mixer, MLA)
            entries += mla(f"{ours}.mixer", f"{theirs}.self_attn", layer.mixer, D)
        if isinstance(layer.ffn, Dense):
            entries += dense(f"{ours}.ffn", f"{theirs}.{names.dense}", layer.ffn, D)
            continue
        assert isinstance(layer.ffn, MoE)
        places = (f"{ours}.ffn", f"{theirs}.{names.moe}")
        entries += sigmoid_moe(*places, layer.ffn, D, empty)
        entries += _experts(places[0], f"{places[1]}.experts", layer.ffn, D, names)
        filled += unbiased(f"{places[1]}.gate.e_score_correction_bias", layer.ffn)
    exact = (*EXACT, r".*\.A_log", r".*\.dt_bias")
    return Layout(tuple(entries), (), tuple(filled), exact)


def _experts(ours: str, theirs: str, moe: MoE, width: int, names: _Names) -> tuple[Entry, ...]:
    if names.fused:
        return fused_experts(ours, theirs, moe, width)
    return experts(ours, theirs, moe, width, ("w1", "w3", "w2"))


def _kda(ours: str, theirs: str, config: KDA, width: int, names: _Names) -> tuple[Entry, ...]:
    """Delta attention; queries, keys and values have a convolution each, ours has one for all."""
    H, K, W = config.heads, config.head_width, config.conv_width
    gate = f"{theirs}.{names.gate}"
    matrices = {
        "w_q": (f"{theirs}.q_proj", H * K, width),
        "w_k": (f"{theirs}.k_proj", H * K, width),
        "w_v": (f"{theirs}.v_proj", H * K, width),
        "w_decay_down": (f"{gate}f_a_proj", K, width),
        "w_decay_up": (f"{gate}f_b_proj", H * K, K),
        "w_beta": (f"{theirs}.b_proj", H, width),
        "w_gate_down": (f"{theirs}.g_a_proj", K, width),
        "w_gate_up": (f"{theirs}.g_b_proj", H * K, K),
        "w_o": (f"{theirs}.o_proj", width, H * K),
    }
    # Theirs is [1, 1, H, 1]; only its first dim may be cut, so that the rest is turned.
    rates = Piece(f"{gate}A_log", (1, 1, H, 1), part=0, turn=Shaped((1, H, 1), (H,)))
    return (
        *(whole(f"{ours}.{name}", f"{x}.weight", *shape) for name, (x, *shape) in matrices.items()),
        _convolutions(f"{ours}.conv_XW", theirs, H * K, W, names),
        whole(f"{ours}.dt_bias", f"{gate}dt_bias", H * K),
        Entry(f"{ours}.a_log_H", (H,), (rates,)),
        whole(f"{ours}.out_norm.w_D", f"{theirs}.o_norm.weight", K),
    )


def _convolutions(ours: str, theirs: str, channels: int, W: int, names: _Names) -> Entry:
    """Depthwise: theirs has a dim of 1 for the channels that each one reads."""
    if names.fused:
        parts = [(f"{theirs}.conv1d", 3 * channels)]
    else:
        parts = [(f"{theirs}.{name}_conv1d", channels) for name in ("q", "k", "v")]
    pieces: list[Piece] = []
    for i, (name, rows) in enumerate(parts):
        turn = Shaped((rows, 1, W), (rows, W))
        at = (slice(i * channels, i * channels + rows),)
        pieces.append(Piece(f"{name}.weight", (rows, 1, W), at=at, turn=turn))
    return Entry(ours, (3 * channels, W), tuple(pieces))
