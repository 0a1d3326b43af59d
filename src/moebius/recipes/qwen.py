"""Qwen3 MoE (arXiv 2505.09388): GQA with normed heads, fine experts, none shared.

Its report publishes the architecture, 36T tokens and a global-batch balance loss, but no rates.
"""

from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.balance.switch import SwitchLoss
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.optim.schedules.cosine import Cosine
from moebius.recipes.dial import NANO, SMALL, Dial
from moebius.recipes.full_size import STAND_IN, adamw
from moebius.recipes.kin import nano, small
from moebius.train.run import Run

WIDTH = 2048


def qwen3_30b_a3b() -> Run:
    """Qwen3 30B-A3B: 128 experts, 8 of them for each token."""
    return Run(
        name="qwen3-30b-a3b",
        model=_model(Dial(WIDTH, WIDTH), 48),
        data=STAND_IN,
        optim=adamw(3e-4, Cosine(warmup=2000)),
        steps=1_100_000,
        batch=8192,
        sequence_length=4096,
        vocab=151_936,
        micro_batch=1,
        recompute=True,
    )


def qwen3_nano() -> Run:
    """Qwen3 30B-A3B for a CPU: 4 layers, 16 experts."""
    return nano("qwen3-nano", _model(Dial(NANO, WIDTH), 4))


def qwen3_small() -> Run:
    """Qwen3 30B-A3B for one GPU: 12 layers, 32 experts."""
    return small("qwen3-small", _model(Dial(SMALL, WIDTH), 12))


def _model(dial: Dial, layers: int) -> ModelConfig:
    mixer = GQA(
        heads=dial.heads(32, 128),
        kv_heads=dial.kv_heads(4, 32, 128),
        head_width=dial.head(128),
        rope_base=1e6,
        qk_norm="head",
    )
    moe = MoE(
        experts=dial.experts(128),
        expert_width=dial.ffn(768),
        top_k=dial.chosen(8),
        router=Softmax(renormalise=True),
        balance=(SwitchLoss(),),
    )
    layers_of_it = layers * (PreNorm(mixer, moe),)
    return ModelConfig(width=dial.width, layers=layers_of_it, norm_eps=1e-6)
