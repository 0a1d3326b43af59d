"""DeepSeek-V3 (arXiv 2412.19437) and Moonlight (2502.16982), the same architecture smaller.

MLA; the first layers dense; sigmoid scores, renormalised; shared experts; a bias that moves by the
sign of the load error instead of a loss, and a very small sequence-wise loss. Multi-token
prediction is left out.
"""

from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.balance.sign import Sign
from moebius.model.ffn.balance.switch import SwitchLoss
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.sigmoid import Sigmoid
from moebius.model.lm import ModelConfig
from moebius.model.mixers.mla import MLA
from moebius.model.rope import RopeScaling, YaRN
from moebius.optim.optimizer import OptimConfig
from moebius.optim.roles import default_roles
from moebius.optim.schedules.cosine import Cosine
from moebius.optim.schedules.wsd import WSD
from moebius.recipes.dial import NANO, SMALL, Dial
from moebius.recipes.full_size import STAND_IN, adamw
from moebius.recipes.kin import nano, small
from moebius.train.run import Run

WIDTH = 7168
BALANCE = (Sign(), SwitchLoss(1e-4, "sequence"))
# Of the released model, whose context YaRN stretched from 4K to 128K (section 4.3).
STRETCH = YaRN(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)


def deepseek_v3() -> Run:
    """DeepSeek-V3, 671B parameters, 37B of them at work."""
    return Run(
        name="deepseek-v3",
        model=_model(Dial(WIDTH, WIDTH), dense=3, sparse=58, scaling=STRETCH),
        data=STAND_IN,
        # Section 4.2: 2K steps of warm-up, 10T tokens constant, then a cosine to a tenth.
        optim=adamw(2.2e-4, WSD(warmup=2000, decay="32%", shape="cosine", floor=0.1)),
        steps=243_000,
        # The batch rises from 3,072 to 15,360 sequences over the first 469B tokens.
        batch=3072,
        batch_ramp=((3100, 6144), (6200, 9216), (9300, 12_288), (12_400, 15_360)),
        sequence_length=4096,
        vocab=129_280,
        micro_batch=1,
        recompute=True,
    )


def moonlight() -> Run:
    """Moonlight 16B-A3B: DeepSeek-V3's architecture, trained with Muon."""
    mixer = MLA(16, None, 512, 128, 64, 128, rope_base=50_000.0)
    moe = MoE(
        experts=64,
        expert_width=1408,
        top_k=6,
        shared_experts=2,
        scaling=2.446,
        router=Sigmoid(renormalise=True),
        balance=BALANCE,
    )
    first, layer = PreNorm(mixer, Dense(11_264)), PreNorm(mixer, moe)
    return Run(
        name="moonlight-16b-a3b",
        model=ModelConfig(width=2048, layers=1 * (first,) + 26 * (layer,)),
        data=STAND_IN,
        # The last half trillion tokens had a rate of their own, which is left out.
        optim=OptimConfig(4.2e-4, Cosine(warmup=2000, floor=0.1), default_roles()),
        steps=175_000,
        batch=2048,
        batch_ramp=((12_000, 4096),),
        sequence_length=8192,
        vocab=163_840,
        micro_batch=1,
        recompute=True,
    )


def deepseek_nano() -> Run:
    """DeepSeek-V3 for a CPU: a dense layer and 3 with 32 experts in 8 groups."""
    return nano("deepseek-nano", _model(Dial(NANO, WIDTH), dense=1, sparse=3))


def deepseek_small() -> Run:
    """DeepSeek-V3 for one GPU: a dense layer and 11 with 64 experts in 8 groups."""
    return small("deepseek-small", _model(Dial(SMALL, WIDTH), dense=1, sparse=11))


def experts(dial: Dial) -> MoE:
    """DeepSeek-V3's mixture of experts."""
    return MoE(
        experts=dial.experts(256),
        expert_width=dial.ffn(2048),
        top_k=dial.chosen(8),
        shared_experts=1,
        scaling=2.5,
        router=Sigmoid(renormalise=True, num_groups=8, top_groups=4),
        balance=BALANCE,
    )


def _model(dial: Dial, dense: int, sparse: int, scaling: RopeScaling | None = None) -> ModelConfig:
    mixer = MLA(
        heads=dial.heads(128, 128),
        q_rank=dial.rank(1536),
        kv_rank=dial.rank(512),
        nope_width=dial.head(128),
        rope_width=dial.head(64),
        v_width=dial.head(128),
        rope_base=1e4,
        rope_scaling=scaling,
    )
    first, layer = PreNorm(mixer, Dense(dial.ffn(18_432))), PreNorm(mixer, experts(dial))
    layers = dense * (first,) + sparse * (layer,)
    return ModelConfig(width=dial.width, layers=layers, norm_eps=1e-6)
