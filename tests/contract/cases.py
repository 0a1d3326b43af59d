"""What the contract tests run over: small configs of every table entry, by the name of the entry.

An entry without a line in `LISTED` is built from the names and types of its fields (`NUMBERS`);
where that cannot work, its test says to add one line here. All fit a model of width WIDTH.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, get_args

import pytest
from torch import nn

from moebius.config import Variant, fields, type_hints, variant_class
from moebius.model.block import BlockConfig
from moebius.model.block.prenorm import PreNorm
from moebius.model.block.scmoe import ScMoE
from moebius.model.ends import EndConfig
from moebius.model.ends.hidden_z import HiddenZ
from moebius.model.ends.mtp import MTP
from moebius.model.ffn import FeedForwardConfig
from moebius.model.ffn.balance import BalanceConfig, Layout
from moebius.model.ffn.balance.budget import Budget
from moebius.model.ffn.balance.group import GroupLoss
from moebius.model.ffn.balance.router_z import RouterZ
from moebius.model.ffn.balance.sign import Sign
from moebius.model.ffn.balance.switch import SwitchLoss
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import Clamp, MoE
from moebius.model.ffn.routers import RouterConfig
from moebius.model.ffn.routers.sigmoid import Sigmoid
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.mixers import MixerConfig
from moebius.model.mixers.cla import CLA
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.kda import KDA
from moebius.model.mixers.mla import MLA
from moebius.model.mixers.nsa import NSA
from moebius.model.mixers.swa import SWA
from moebius.model.part import Site
from moebius.model.rope import Linear, YaRN

from .lending import Beside

WIDTH, VOCAB = 32, 40
SITE = Site(WIDTH, num_writes=4, layer=1, eps=1e-5)
LAYOUT = Layout(num_ffn=4, num_zero=2, top_k=3, ffn_per_token=2.0)

# What a field of this name is given where a config is built from the names of its fields.
NUMBERS = {
    "heads": 4,
    "kv_heads": 2,
    "head_width": 8,
    "width": 16,
    "hidden": 16,
    "window": 5,
    "experts": 4,
    "expert_width": 16,
    "top_k": 2,
    "rank": 8,
}

GQA_, DENSE = GQA(4, 2, 8), Dense(48)
MLA_ = MLA(heads=4, q_rank=12, kv_rank=8, nope_width=8, rope_width=4, v_width=6)
NSA_ = NSA(4, 2, 8, block=4, stride=2, selected_block=4, num_selected=4, window=3)
MOE = MoE(
    experts=4,
    expert_width=16,
    top_k=3,
    zero_experts=2,
    ffn_per_token=2.0,
    shared_experts=1,
    scaling=1.5,
    split=2.0,
    balance=(Budget(), Sign(), GroupLoss(groups=2), SwitchLoss(), RouterZ()),
)

LISTED: dict[type[Variant], dict[str, dict[str, Variant]]] = {
    MixerConfig: {
        "gqa": {
            "plain": GQA_,
            "one_kv": GQA(4, 1, 8),
            "qk_norm": GQA(4, 2, 8, qk_norm="head"),
            "nope": GQA(4, 4, 8, rope_base=None),
            "biased": GQA(4, 2, 8, bias=True, qk_norm="full", sinks=True),
            "late_norm": GQA(4, 2, 8, qk_norm="head_after_rope", rope_scaling=Linear(4.0)),
        },
        "swa": {
            "plain": SWA(4, 2, 8, window=5),
            "sinks": SWA(4, 2, 8, window=5, sinks=True),
            "self": SWA(4, 2, 8, window=1, sinks=True),
            "qk_norm_nope": SWA(4, 2, 8, window=3, rope_base=None, qk_norm="head"),
        },
        "mla": {
            "plain": MLA_,
            "full_rank_q": dataclasses.replace(MLA_, q_rank=None),
            "nope": dataclasses.replace(MLA_, rope_base=None),
            "scaled": dataclasses.replace(MLA_, scale_correction=True),
            "yarn": dataclasses.replace(
                MLA_, bias=True, rope_scaling=YaRN(4.0, 8, mscale=0.7, mscale_all_dim=1.0)
            ),
        },
        "cla": {
            "lender": CLA(GQA(4, 2, 8, qk_norm="head")),
            "borrower": CLA(GQA(4, 2, 8, qk_norm="head", bias=True, sinks=True), borrows=True),
            "window_lender": CLA(SWA(4, 2, 8, window=5)),
            "window_borrower": CLA(SWA(4, 2, 8, window=5), borrows=True),
            "latents_lender": CLA(MLA_),
            "latents_borrower": CLA(dataclasses.replace(MLA_, q_rank=None), borrows=True),
        },
        "nsa": {
            "plain": NSA_,
            "one_kv": dataclasses.replace(NSA_, kv_heads=1, compression="mean", rope_base=None),
            "shared_kv": dataclasses.replace(NSA_, num_selected=3, separate_kv=False),
            "wide": dataclasses.replace(NSA_, kv_heads=4, stride=4, selected_block=8),
            "far": dataclasses.replace(NSA_, block=6, num_selected=6, selected_block=2),
        },
        "kda": {
            "plain": KDA(4, 8),
            "bounded": KDA(3, 5, conv_width=2, lower_bound=-5.0, negative_eigenvalues=True),
            "no_conv": KDA(2, 8, conv_width=1),
        },
    },
    FeedForwardConfig: {
        "dense": {"plain": DENSE, "biased": Dense(48, bias=True)},
        "moe": {
            "all_rules": MOE,
            # Widths that kernels take.
            "bare": MoE(experts=4, expert_width=32, top_k=2),
            "biased": MoE(
                4, 16, 2, router=Softmax(True, bias=True), bias=True, clamp=Clamp(limit=2.0)
            ),
            "sigmoid": MoE(experts=4, expert_width=16, top_k=2, router=Sigmoid(renormalise=True)),
        },
    },
    BlockConfig: {
        "prenorm": {"moe": PreNorm(SWA(4, 2, 8, window=5), MOE), "dense": PreNorm(GQA_, DENSE)},
        "scmoe": {"mla": ScMoE(dataclasses.replace(MLA_, scale_correction=True), DENSE, MOE)},
    },
    EndConfig: {
        "mtp": {"one": MTP(GQA_, DENSE), "two": MTP(MLA_, DENSE, depth=2, weight=0.3)},
        "hidden_z": {"plain": HiddenZ(coefficient=1e-2)},
    },
    RouterConfig: {
        "softmax": {"plain": Softmax(), "groups": Softmax(True, num_groups=3, top_groups=2)},
        "sigmoid": {"plain": Sigmoid(), "groups": Sigmoid(True, num_groups=3, top_groups=2)},
    },
    BalanceConfig: {
        "budget": {
            "pid": Budget(integral=0.1, derivative=0.2),
            "adaptive": Budget(mean_gain=20.0, adaptive=True),
        },
        "sign": {"plain": Sign()},
        "group": {
            "sequence": GroupLoss(groups=2, scope="sequence"),
            "micro_batch": GroupLoss(scope="micro_batch"),
            "global": GroupLoss(scope="global"),
        },
        "switch": {"sequence": SwitchLoss(scope="sequence"), "global": SwitchLoss()},
        "router_z": {"plain": RouterZ()},
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One config to check, made when its test runs, so that a broken one breaks no other."""

    name: str
    make: Callable[[], Any]


def cases(base: type[Variant]) -> list[Any]:
    """A pytest parameter for every variant of every table entry of a seam."""
    listed = LISTED[base]
    found: list[Case] = []
    for entry in base.TABLE:
        if entry not in listed:
            found.append(Case(entry, lambda entry=entry: generic(variant_class(base, entry))))
        for variant, config in listed.get(entry, {}).items():
            found.append(Case(f"{entry}-{variant}", lambda config=config: config))
    return [pytest.param(case, id=case.name) for case in found]


def generic(cls: type[Variant]) -> Any:
    """A small config of any class of a seam, guessed from the names and types of its fields."""
    hints = type_hints(cls)
    values = {
        field.name: _guess(cls, field.name, hints[field.name])
        for field in fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    try:
        config = cls(**values)
        build(config)
    except ValueError as error:
        raise AssertionError(_ask(cls, str(error))) from error
    return config


def _guess(cls: type, name: str, hint: Any) -> Any:
    if type(None) in get_args(hint):
        return None
    if isinstance(hint, type) and issubclass(hint, Variant):
        return next(iter(next(iter(LISTED[hint].values())).values()))
    known = (number for key, number in NUMBERS.items() if name == key or name.endswith(f"_{key}"))
    simple: Mapping[Any, Any] = {int: next(known, 4), float: 1.0, bool: False}
    if hint not in simple:
        raise AssertionError(_ask(cls, f"field {name!r} cannot be guessed"))
    return simple[hint]


def _ask(cls: type, why: str) -> str:
    return f"{cls.__name__}: {why}; add one line for it to LISTED in tests/contract/cases.py"


def build(config: Any) -> nn.Module:
    """The module of a config of any seam, its weights not yet initialised."""
    if isinstance(config, RouterConfig):
        return config.build(SITE, LAYOUT.num_outputs, LAYOUT.top_k)
    if isinstance(config, BalanceConfig):
        return config.build(LAYOUT)
    if isinstance(config, CLA) and config.borrows:
        return Beside(config, SITE)
    return config.build(SITE)
