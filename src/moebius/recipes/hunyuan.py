"""Hunyuan-Large (arXiv 2411.02265): GQA whose keys and values serve two layers, top-1 of 16.

Norms of queries and keys come after the rotation; one shared expert is always on; tokens over an
expert's capacity are recycled to free slots; experts learn at 0.31 of the rate. Widths of experts,
tying and norms are those of the released code.
"""

from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.balance.switch import SwitchLoss
from moebius.model.ffn.capacity import Capacity
from moebius.model.ffn.moe import MoE
from moebius.model.lm import ModelConfig
from moebius.model.mixers.cla import shared
from moebius.model.mixers.gqa import GQA
from moebius.optim.schedules.three_phase import ThreePhase
from moebius.recipes.dial import NANO, SMALL, Dial
from moebius.recipes.full_size import STAND_IN, adamw
from moebius.recipes.kin import nano, small
from moebius.train.run import Run
from moebius.train.stages import Stage

WIDTH = 6400
STEP = 4096 * 4096  # tokens
# Section 3: the shared learning rate times this is that of a specialised expert.
EXPERT_LR = 0.31


def hunyuan_large() -> Run:
    """Hunyuan-Large, 389B parameters, 52B of them at work."""
    return Run(
        name="hunyuan-large",
        model=_model(Dial(WIDTH, WIDTH), 64),
        data=STAND_IN,
        # Peak rate, batch, length and warm-up are not published.
        optim=adamw(2.2e-4, ThreePhase(warmup=2000), expert_lr=EXPERT_LR),
        steps=418_392,
        batch=4096,
        sequence_length=4096,
        # 7T tokens, then some 10B each at 32K and 256K; of the bases only the last is published.
        stages=(
            Stage(417_200 * STEP, 32_768),
            Stage(417_796 * STEP, 262_144, rope_base=1e9),
        ),
        vocab=129_024,
        micro_batch=1,
        recompute=True,
    )


def hunyuan_nano() -> Run:
    """Hunyuan-Large for a CPU: 2 layers that share keys and values, 16 experts."""
    schedule = ThreePhase(warmup="2%", annealing="30%", floor=0.0)
    model = _model(Dial(NANO, WIDTH), 2)
    return nano("hunyuan-nano", model, schedule, expert_lr=EXPERT_LR, head_lr=5.0)


def hunyuan_small() -> Run:
    """Hunyuan-Large for one GPU: 8 layers in pairs, 16 experts."""
    schedule = ThreePhase(warmup="2%")
    model = _model(Dial(SMALL, WIDTH), 8)
    return small("hunyuan-small", model, schedule, expert_lr=EXPERT_LR, head_lr=5.0)


def _model(dial: Dial, layers: int) -> ModelConfig:
    attention = GQA(
        heads=dial.heads(80, 80),
        kv_heads=dial.kv_heads(8, 80, 80),
        head_width=dial.head(80),
        rope_base=1e4,
        qk_norm="head_after_rope",
    )
    moe = MoE(
        experts=dial.experts(16),
        expert_width=dial.ffn(18_304),
        top_k=dial.chosen(1),
        shared_experts=1,
        # Neither the coefficient nor the capacity factor is published.
        balance=(SwitchLoss(1e-2),),
        capacity=Capacity(1.25, "recycle"),
    )
    pair = tuple(PreNorm(mixer, moe) for mixer in shared(attention, 2))
    # A tied matrix starts small; unscaled, tokens weigh too little against the first layers of kin.
    scale = 1.0 if dial.exact else 4.0
    layers_of_it = layers // 2 * pair
    return ModelConfig(width=dial.width, layers=layers_of_it, tied=True, embedding_scale=scale)
