"""The pico: a MoE so small that it sees forty tokens for each active parameter in minutes.

Qwen3-MoE's parts (GQA with normed heads, renormalised softmax, no shared expert) at width 64, with
Muon for matrices and experts, on the source of the installed torch: enough text not to be read
twice, the same for everybody. `moebius lab race pico` compares it with its dense twin by the clock.
"""

from moebius.data.config import DataConfig
from moebius.model.block.prenorm import PreNorm
from moebius.model.ends.hidden_z import HiddenZ
from moebius.model.ffn.balance.switch import SwitchLoss
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.optim.optimizer import OptimConfig
from moebius.optim.schedules.wsd import WSD
from moebius.recipes.kin import roles_of
from moebius.train.run import Run


def pico() -> Run:
    """A Qwen3-like MoE on the source of torch: 32 experts, two for each token."""
    mixer = GQA(heads=2, kv_heads=2, head_width=32, rope_base=10_000.0, qk_norm="head")
    moe = MoE(
        experts=32,
        expert_width=128,
        top_k=2,
        router=Softmax(renormalise=True),
        balance=(SwitchLoss(),),
    )
    return Run(
        name="pico",
        model=ModelConfig(width=64, layers=4 * (PreNorm(mixer, moe),), ends=(HiddenZ(),)),
        data=DataConfig(path="python:torch"),
        optim=OptimConfig(
            lr=0.008,
            weight_decay=0.1,
            clip=1.0,
            schedule=WSD(warmup="2%", decay="50%"),
            roles=roles_of(40.0, router_lr=0.1),
        ),
        steps=3600,
        batch=8,
        sequence_length=512,
        vocab=1024,
    )
