"""Recipes so small that a whole run takes seconds: `moebius train tests/tiny.py:tiny`.

`tiny` is a LongCat-style ScMoE with zero experts under a budget; `pattern` a pre-norm stack of a
local and a full layer; `wild` what the two leave out. All read this repository's own source unless
`data.path` says otherwise.
"""

import dataclasses
from pathlib import Path

from moebius.data.config import DataConfig
from moebius.model.block.prenorm import PreNorm
from moebius.model.block.scmoe import ScMoE
from moebius.model.ends.hidden_z import HiddenZ
from moebius.model.ends.mtp import MTP
from moebius.model.ffn.balance.budget import Budget
from moebius.model.ffn.balance.group import GroupLoss
from moebius.model.ffn.balance.router_z import RouterZ
from moebius.model.ffn.balance.sign import Sign
from moebius.model.ffn.balance.switch import SwitchLoss
from moebius.model.ffn.capacity import Capacity
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.sigmoid import Sigmoid
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.mla import MLA
from moebius.model.mixers.swa import SWA
from moebius.optim.optimizer import OptimConfig
from moebius.optim.roles import default_roles
from moebius.optim.rules.adamw import AdamW
from moebius.optim.schedules.cosine import Cosine
from moebius.optim.schedules.wsd import WSD
from moebius.train.run import Run

SOURCE = str(Path(__file__).resolve().parents[1] / "src")


def tiny() -> Run:
    """ScMoE, MLA, zero experts, the budget controller, the group loss and the hidden z-loss."""
    mixer = MLA(
        heads=2,
        q_rank=16,
        kv_rank=16,
        nope_width=8,
        rope_width=8,
        v_width=8,
        rope_base=10_000.0,
        scale_correction=True,
    )
    moe = MoE(
        experts=8,
        zero_experts=4,
        top_k=3,
        ffn_per_token=2.0,
        expert_width=16,
        balance=(Budget(), GroupLoss()),
    )
    layer = ScMoE(mixer=mixer, dense=Dense(32), moe=moe)
    model = ModelConfig(width=32, layers=(layer,), ends=(HiddenZ(),))
    return _run("tiny", model)


def pattern() -> Run:
    """A dense layer that sees a window, then a MoE layer that sees all; head tied."""
    local = PreNorm(SWA(heads=4, kv_heads=2, head_width=8, window=8), Dense(64))
    full = PreNorm(
        GQA(heads=4, kv_heads=2, head_width=8, qk_norm="head"),
        MoE(experts=4, top_k=2, expert_width=32, shared_experts=1, balance=(GroupLoss(),)),
    )
    return _run("pattern", ModelConfig(width=32, layers=1 * (local,) + (full,), tied=True))


def wild() -> Run:
    """All that holds a state or draws at random: recycled tokens, loads of the batch before."""
    heads = GQA(heads=2, kv_heads=1, head_width=16)
    moe = MoE(
        experts=8,
        top_k=2,
        expert_width=16,
        scaling=1.5,
        router=Sigmoid(renormalise=True, num_groups=4, top_groups=2),
        balance=(Sign(), SwitchLoss(), RouterZ()),
        capacity=Capacity(1.0, "recycle"),
    )
    local = PreNorm(SWA(heads=2, kv_heads=2, head_width=8, window=5, sinks=True), Dense(48))
    layers = (local, PreNorm(heads, moe), ScMoE(heads, Dense(16), moe))
    ends = (MTP(heads, Dense(32)), HiddenZ())
    return dataclasses.replace(
        _run("wild", ModelConfig(width=32, layers=layers, ends=ends, tied=True)),
        optim=OptimConfig(
            lr=0.003, schedule=Cosine(warmup=2), roles=default_roles(AdamW(), expert_lr=0.5)
        ),
        batch_ramp=((4, 6), (8, 8)),
    )


def tower() -> Run:
    """`wild` of four layers, for pipelines: the first and the last stage share the embedding."""
    run = wild()
    local, _, shortcut = run.model.layers
    assert isinstance(shortcut, ScMoE)
    heads = GQA(heads=2, kv_heads=2, head_width=16)
    full = PreNorm(heads, shortcut.moe)
    layers = (local, full, dataclasses.replace(shortcut, mixer=heads), full)
    ends = (MTP(heads, Dense(32)), HiddenZ())
    model = dataclasses.replace(run.model, layers=layers, ends=ends)
    return dataclasses.replace(run, name="tower", model=model, batch_ramp=())


def column() -> Run:
    """`tower`, whose last stage needs nothing of the first."""
    run = tower()
    return dataclasses.replace(
        run, model=dataclasses.replace(run.model, ends=(HiddenZ(),), tied=False)
    )


def no_evaluation(*_: object, **__: object) -> dict[str, float]:
    """For runs of which only the losses matter: `evaluation=tests/tiny.py:no_evaluation`."""
    return {}


def _run(name: str, model: ModelConfig) -> Run:
    return Run(
        name=name,
        model=model,
        data=DataConfig(path=SOURCE),
        optim=OptimConfig(lr=0.01, schedule=WSD(), roles=default_roles()),
        steps=12,
        batch=4,
        sequence_length=32,
        vocab=300,
        precision="fp32",
        checkpoint_every=4,
        threads=1,
        matmul_flops=1e11,
    )
