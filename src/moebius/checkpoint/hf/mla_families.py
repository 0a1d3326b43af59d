"""What DeepSeek-V3, LongCat-Flash and Kimi Linear share: latent attention, and routers that select
by score plus bias.

Keys of a config.json, refusals, and maps of tensors. Letters: D model width, F hidden width, E
experts.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Final, TypeVar

from moebius.checkpoint.hf import Target
from moebius.checkpoint.hf.keys import Keys
from moebius.checkpoint.hf.layout import Entry
from moebius.checkpoint.hf.matching import state_shapes
from moebius.checkpoint.hf.pieces import biased_rules, nothing, rules, swiglu, whole
from moebius.checkpoint.hf.refusals import Refusals
from moebius.checkpoint.hf.rope import read_plain_rope
from moebius.config import Variant
from moebius.model.ends.mtp import MTP
from moebius.model.ffn import FeedForwardConfig
from moebius.model.ffn.balance.sign import Sign
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.sigmoid import Sigmoid
from moebius.model.lm import ModelConfig
from moebius.model.mixers.mla import MLA
from moebius.model.rope import NTKAlpha, RopeScaling, YaRN

V = TypeVar("V", bound=Variant)

# transformers norms the latents with its class's default, whatever rms_norm_eps says.
LATENT_EPS: Final = 1e-6
# Selection biases are steps of 0.001 on scores near 0.5: half precision would swallow them.
EXACT: Final = (r".*\.e_score_correction_bias",)


@dataclasses.dataclass(frozen=True)
class MoENames:
    """What a family calls the numbers of a mixture with a sigmoid router."""

    experts: str
    top_k: str
    shared: str
    groups: str
    renormalise: str


# --- reading --------------------------------------------------------------------------------------


def read_mla(
    keys: Keys,
    q_rank: int | None,
    base: float | None,
    scaling: RopeScaling | None,
    scale_correction: bool = False,
) -> MLA:
    """Latent attention; the widths that a config may repeat have to agree."""
    heads = keys.integer("num_attention_heads")
    nope, rope = keys.integer("qk_nope_head_dim", 128), keys.integer("qk_rope_head_dim", 64)
    each = "every head has its own keys and values"
    keys.must("num_key_value_heads", heads, None, why=each)
    keys.must("qk_head_dim", nope + rope, None, why="it is qk_nope_head_dim + qk_rope_head_dim")
    return MLA(
        heads=heads,
        q_rank=q_rank,
        kv_rank=keys.integer("kv_lora_rank", 512),
        nope_width=nope,
        rope_width=rope,
        v_width=keys.integer("v_head_dim", 128),
        rope_base=base,
        rope_scaling=scaling,
        scale_correction=scale_correction,
        latent_eps=LATENT_EPS,
        bias=keys.flag("attention_bias", False),
    )


def read_latent_rope(keys: Keys, default_base: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary part, whose width transformers takes from `head_dim`."""
    rope = keys.integer("qk_rope_head_dim", 64)
    keys.must("head_dim", rope, None, why="rotary positions are as wide as qk_rope_head_dim")
    return read_plain_rope(keys, default_base)


def read_moe(keys: Keys, names: MoENames, width: int, scaling: float, groups: int, top: int) -> MoE:
    """A mixture with a sigmoid router, its bias held by DeepSeek's own rule."""
    router = Sigmoid(
        renormalise=keys.flag(names.renormalise, True),
        num_groups=keys.integer(names.groups, groups),
        top_groups=keys.integer("topk_group", top),
    )
    return MoE(
        experts=keys.integer(names.experts, 256),
        expert_width=keys.integer("moe_intermediate_size", width),
        top_k=keys.integer(names.top_k, 8),
        # Null is none. Absent should be 1, but then the tensors of that one are refused by name.
        shared_experts=keys.integer(names.shared, 0),
        scaling=keys.number("routed_scaling_factor", scaling),
        router=router,
        balance=(Sign(),),
    )


# --- writing --------------------------------------------------------------------------------------


def write_mla(mla: MLA) -> dict[str, Any]:
    """The keys of `read_mla`, and `head_dim`."""
    return {
        "num_attention_heads": mla.heads,
        "num_key_value_heads": mla.heads,
        "kv_lora_rank": mla.kv_rank,
        "q_lora_rank": mla.q_rank,
        "qk_rope_head_dim": mla.rope_width,
        "qk_nope_head_dim": mla.nope_width,
        "qk_head_dim": mla.nope_width + mla.rope_width,
        "v_head_dim": mla.v_width,
        "head_dim": mla.rope_width,
        "attention_bias": mla.bias,
        "attention_dropout": 0.0,
    }


def write_moe(names: MoENames, moe: MoE, target: Target) -> dict[str, Any]:
    """The keys of `read_moe`. For none, transformers wants 0 shared experts, servers null."""
    assert isinstance(moe.router, Sigmoid)
    none = 0 if target == "transformers" else None
    return {
        names.experts: moe.experts,
        names.top_k: moe.top_k,
        names.shared: moe.shared_experts or none,
        names.groups: moe.router.num_groups,
        "topk_group": moe.router.top_groups,
        names.renormalise: moe.router.renormalise,
        "routed_scaling_factor": moe.scaling * moe.split,
        "moe_intermediate_size": moe.expert_width,
    }


# --- refusing -------------------------------------------------------------------------------------


def refuse_mla(no: Refusals, mla: MLA, model: ModelConfig, target: Target, where: str) -> None:
    """What a loader cannot do with a latent attention."""
    served = target != "transformers"
    # Servers norm the latents with rms_norm_eps; published models bear that difference as well.
    eps = (LATENT_EPS, model.norm_eps) if served else (LATENT_EPS,)
    no.unless(mla.latent_eps in eps, f"{where}.latent_eps", f"must be {LATENT_EPS}")
    no.unless(not (served and mla.bias), f"{where}.bias", f"{target} has none here")
    scaling = mla.rope_scaling
    there = f"{where}.rope_scaling"
    no.unless(not isinstance(scaling, NTKAlpha), there, "it does not know this one")
    if not served or scaling is None:
        return
    # Servers take any scaling of a latent attention for DeepSeek's own YaRN, with its defaults.
    if no.unless(isinstance(scaling, YaRN), there, f"{target} has only yarn here"):
        assert isinstance(scaling, YaRN)
        plain = scaling.truncate and scaling.attention_factor is None
        both = (scaling.mscale is None) == (scaling.mscale_all_dim is None)
        why = f"{target} has neither attention_factor nor truncate, and mscale only as a pair"
        no.unless(plain and both, there, why)


def refuse_moe(no: Refusals, moe: MoE, where: str) -> None:
    """What no router with a selection bias of these families has; see `refuse_biases` as well."""
    no.unless(not moe.bias, f"{where}.bias", "its experts have none")
    no.unless(moe.clamp is None, f"{where}.clamp", "its experts are plain SwiGLUs")
    biased = biased_rules(moe)
    why = f"{len(biased)} rules hold a selection bias, it has room for one: keep one such rule"
    no.unless(len(biased) <= 1, f"{where}.balance", why)


def refuse_sigmoid_moe(no: Refusals, moe: MoE, where: str) -> None:
    """What DeepSeek's mixture has not."""
    refuse_moe(no, moe, where)
    no.unless(not moe.zero_experts, f"{where}.zero_experts", "it has none")
    router = no.kind(moe.router, Sigmoid, f"{where}.router")
    if router is not None:
        fits = moe.experts // router.num_groups >= 2
        why = "it scores a group by its two best experts; make groups of at least 2"
        no.unless(fits, f"{where}.router.num_groups", why)


def refuse_ends_but_mtp(no: Refusals, model: ModelConfig) -> None:
    """An MTP end is left out (see `left_out_ends`): it drafts and trains, and moves no logit."""
    others = tuple(end for end in model.ends if not isinstance(end, MTP))
    no.ends(dataclasses.replace(model, ends=others))


# --- mapping --------------------------------------------------------------------------------------


def left_out_ends(model: ModelConfig, vocab: int) -> tuple[Entry, ...]:
    """Entries of ends that a family has no place for."""
    if not model.ends:
        return ()
    why = "multi-token prediction by a dense layer, where this family has a mixture; no logit moves"
    shapes = state_shapes(model, vocab).items()
    return tuple(Entry(name, x, fill=0.0, why=why) for name, x in shapes if name[:5] == "ends.")


def sigmoid_moe(
    ours: str, theirs: str, moe: MoE, width: int, empty_shared: bool
) -> tuple[Entry, ...]:
    """Router, rules and shared experts. `empty_shared`: for none of these, tensors of size 0."""
    gate, shared = f"{theirs}.gate", f"{theirs}.shared_experts"
    names = (f"{ours}.shared_gate_up", f"{ours}.shared_down")
    router = whole(f"{ours}.router.w_ED", f"{gate}.weight", moe.experts, width)
    entries = rules(ours, f"{gate}.e_score_correction_bias", moe)
    if moe.shared_experts:
        entries += swiglu(*names, shared, moe.shared_experts * moe.expert_width, width)
    elif empty_shared:
        # They make up no numbers of the router; that they are there is what their shapes check.
        shapes = {"gate_proj": (0, width), "up_proj": (0, width), "down_proj": (width, 0)}
        empty = [nothing(f"{shared}.{name}.weight", *x) for name, x in shapes.items()]
        router = dataclasses.replace(router, pieces=(*router.pieces, *empty))
    return (router, *entries)


def maybe_empty(ffns: Iterable[FeedForwardConfig]) -> tuple[bool, ...]:
    """Whether an import may find shared experts of size 0: transformers saves them for none."""
    lone = any(isinstance(ffn, MoE) and not ffn.shared_experts for ffn in ffns)
    return (False, True) if lone else (False,)
