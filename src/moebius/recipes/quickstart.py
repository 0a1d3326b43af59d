"""The quickstart: a LongCat-style MoE on the machine's own Python library, in minutes.

Two ScMoE layers of width 256; MLA with variance alignment; zero-computation experts under the
budget controller; hidden z-loss; Muon for the matrices that every token uses, AdamW for the rest:
Newton-Schulz over all experts would take a quarter of the step and learns no faster here.
"""

from moebius.data.config import DataConfig
from moebius.model.block.scmoe import ScMoE
from moebius.model.ends.hidden_z import HiddenZ
from moebius.model.ffn.balance.budget import Budget
from moebius.model.ffn.balance.group import GroupLoss
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.lm import ModelConfig
from moebius.model.mixers.mla import MLA
from moebius.optim.optimizer import OptimConfig, Role
from moebius.optim.rules.adamw import AdamW
from moebius.optim.schedules.wsd import WSD
from moebius.recipes.kin import roles_of
from moebius.train.run import Run

# In so short a run scores drift all the way: the mean, which holds the budget, must follow fast; a
# single expert's bias must not, or it leaps over the small gaps between scores.
BUDGET = Budget(mu=0.01, integral=0.02, mean_gain=400.0)


def quickstart() -> Run:
    """A LongCat-style MoE on this machine's Python library: no download, minutes on a CPU."""
    mixer = MLA(
        heads=4,
        q_rank=128,
        kv_rank=64,
        nope_width=32,
        rope_width=32,
        v_width=64,
        rope_base=10_000.0,
        scale_correction=True,
    )
    moe = MoE(
        experts=40,
        zero_experts=20,
        top_k=4,
        ffn_per_token=3.0,
        expert_width=192,
        split=2.0,
        balance=(BUDGET, GroupLoss()),
    )
    layer = ScMoE(mixer=mixer, dense=Dense(512), moe=moe)
    roles = roles_of(40.0)
    roles["expert"] = Role(AdamW(), lr=0.7)
    return Run(
        name="quickstart",
        model=ModelConfig(width=256, layers=2 * (layer,), ends=(HiddenZ(),)),
        data=DataConfig(path="python:stdlib"),
        optim=OptimConfig(
            lr=0.006,
            weight_decay=0.1,
            clip=1.0,
            schedule=WSD(warmup="2%", decay="50%"),
            roles=roles,
        ),
        steps=760,
        batch=8,
        sequence_length=512,
        vocab=4096,
    )
