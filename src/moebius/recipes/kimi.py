"""Kimi Linear (arXiv 2510.26692): three layers of KDA to one of MLA without positions.

The released 48B model has 27 layers: full attention at the 4th, 8th ... 24th and at the last, 20
layers of KDA between; the first layer is dense.
"""

from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn import FeedForwardConfig
from moebius.model.ffn.balance.sign import Sign
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.sigmoid import Sigmoid
from moebius.model.lm import ModelConfig
from moebius.model.mixers.kda import KDA
from moebius.model.mixers.mla import MLA
from moebius.optim.optimizer import OptimConfig
from moebius.optim.roles import default_roles
from moebius.optim.schedules.wsd import WSD
from moebius.recipes.dial import NANO, SMALL, Dial
from moebius.recipes.full_size import STAND_IN
from moebius.recipes.kin import nano, small
from moebius.train.run import Run

WIDTH = 2304
# Layers with full attention, counted from 1, as in the released config.
FULL = (4, 8, 12, 16, 20, 24, 27)


def kimi_linear() -> Run:
    """Kimi Linear 48B-A3B: 20 layers of KDA, 7 of MLA."""
    return Run(
        name="kimi-linear-48b-a3b",
        model=_model(Dial(WIDTH, WIDTH), 27, FULL),
        data=STAND_IN,
        # MuonClip there; Muon here, without the clipping of queries and keys.
        optim=OptimConfig(1.1e-3, WSD(warmup=2000, decay="20%"), default_roles()),
        steps=43_000,
        batch=8192,
        sequence_length=4096,
        vocab=163_840,
        micro_batch=1,
        recompute=True,
    )


def kimi_linear_nano() -> Run:
    """Kimi Linear for a CPU: 3 layers of KDA, 1 of MLA."""
    return nano("kimi-linear-nano", _model(Dial(NANO, WIDTH), 4, (4,)))


def kimi_linear_small() -> Run:
    """Kimi Linear for one GPU: 6 layers of KDA, 2 of MLA."""
    return small("kimi-linear-small", _model(Dial(SMALL, WIDTH), 8, (4, 8)))


def _model(dial: Dial, layers: int, full: tuple[int, ...]) -> ModelConfig:
    linear = KDA(heads=dial.heads(32, 128), head_width=dial.head(128))
    latent = MLA(
        heads=dial.heads(32, 128),
        q_rank=None,
        kv_rank=dial.rank(512),
        nope_width=dial.head(128),
        rope_width=dial.head(64),
        v_width=dial.head(128),
        rope_base=None,
    )
    moe = MoE(
        experts=dial.experts(256),
        expert_width=dial.ffn(1024),
        top_k=dial.chosen(8),
        shared_experts=1,
        scaling=2.446,
        router=Sigmoid(renormalise=True),
        balance=(Sign(),),
    )
    ffns: tuple[FeedForwardConfig, ...] = (Dense(dial.ffn(9216)),) + (layers - 1) * (moe,)
    numbered = enumerate(ffns, 1)
    pattern = tuple(PreNorm(latent if i in full else linear, ffn) for i, ffn in numbered)
    return ModelConfig(width=dial.width, layers=pattern)
