"""OLMoE-1B-7B (arXiv 2409.02060): 64 experts in every layer, 8 chosen, weights not renormalised.

Norms of queries and keys span all heads; balance and router z-losses are Switch's and ST-MoE's.
"""

from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.balance.router_z import RouterZ
from moebius.model.ffn.balance.switch import SwitchLoss
from moebius.model.ffn.moe import MoE
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.optim.schedules.cosine import Cosine
from moebius.recipes.dial import NANO, SMALL, Dial
from moebius.recipes.full_size import STAND_IN, adamw
from moebius.recipes.kin import nano, small
from moebius.train.run import Run

WIDTH = 2048


def olmoe_1b_7b() -> Run:
    """OLMoE 1B-7B: 7B parameters, 1B of them at work."""
    return Run(
        name="olmoe-1b-7b",
        model=_model(Dial(WIDTH, WIDTH), 16),
        data=STAND_IN,
        optim=adamw(4e-4, Cosine(warmup=2500)),
        steps=1_223_000,
        batch=1024,
        sequence_length=4096,
        vocab=50_304,
        micro_batch=1,
        recompute=True,
    )


def olmoe_nano() -> Run:
    """OLMoE for a CPU: 4 layers, 16 experts."""
    return nano("olmoe-nano", _model(Dial(NANO, WIDTH), 4))


def olmoe_small() -> Run:
    """OLMoE for one GPU: 10 layers, 32 experts."""
    return small("olmoe-small", _model(Dial(SMALL, WIDTH), 10))


def _model(dial: Dial, layers: int) -> ModelConfig:
    mixer = GQA(
        heads=dial.heads(16, 128),
        kv_heads=dial.kv_heads(16, 16, 128),
        head_width=dial.head(128),
        rope_base=1e4,
        qk_norm="full",
    )
    moe = MoE(
        experts=dial.experts(64),
        expert_width=dial.ffn(1024),
        top_k=dial.chosen(8),
        balance=(SwitchLoss(1e-2), RouterZ()),
    )
    return ModelConfig(width=dial.width, layers=layers * (PreNorm(mixer, moe),))
