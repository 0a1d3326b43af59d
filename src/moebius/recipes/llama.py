"""Llama 3 (arXiv 2407.21783): dense, grouped-query attention, SwiGLU.

Sizes, peak rates and the steps of the 405B model (warm-up, cosine, the batch in three stages) are
the paper's; the smaller two take the same course.
"""

from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.dense import Dense
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.optim.schedules.cosine import Cosine
from moebius.recipes.dial import NANO, SMALL, Dial
from moebius.recipes.full_size import STAND_IN, adamw
from moebius.recipes.kin import nano, small
from moebius.train.run import Run
from moebius.train.stages import Stage

VOCAB = 128_256
STEP = 1024 * 4096  # tokens


def llama3_8b() -> Run:
    """Llama 3 8B: 32 layers, dense."""
    return _published("llama3-8b", _model(Dial(4096, 4096), 32, 32, 14_336), 3e-4)


def llama3_70b() -> Run:
    """Llama 3 70B: 80 layers, dense."""
    return _published("llama3-70b", _model(Dial(8192, 8192), 80, 64, 28_672), 1.5e-4)


def llama3_405b() -> Run:
    """Llama 3 405B: 126 layers, dense."""
    return _published("llama3-405b", _model(Dial(16_384, 16_384), 126, 128, 53_248), 8e-5)


def llama3_nano() -> Run:
    """Llama 3 8B for a CPU: 4 layers."""
    return nano("llama3-nano", _model(Dial(NANO, 4096), 4, 32, 14_336))


def llama3_small() -> Run:
    """Llama 3 8B for one GPU: 12 layers."""
    return small("llama3-small", _model(Dial(SMALL, 4096), 12, 32, 14_336))


def _model(dial: Dial, layers: int, heads: int, hidden: int) -> ModelConfig:
    mixer = GQA(
        heads=dial.heads(heads, 128),
        kv_heads=dial.kv_heads(8, heads, 128),
        head_width=dial.head(128),
        rope_base=500_000.0,
    )
    layer = PreNorm(mixer, Dense(dial.ffn(hidden)))
    return ModelConfig(width=dial.width, layers=layers * (layer,))


def _published(name: str, model: ModelConfig, lr: float) -> Run:
    return Run(
        name=name,
        model=model,
        data=STAND_IN,
        optim=adamw(lr, Cosine(warmup=8000, floor=0.01)),
        steps=1_200_000,
        # Section 3.4.1: 4M tokens a step, 8M after 252M tokens, 16M after 2.87T.
        batch=1024,
        sequence_length=4096,
        stages=(
            Stage(60 * STEP, 8192, batch=1024),
            Stage(684_260 * STEP, 8192, batch=2048),
        ),
        vocab=VOCAB,
        micro_batch=1,
        recompute=True,
    )
