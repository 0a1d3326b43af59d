"""LongCat-Flash (arXiv 2509.01322): shortcut-connected MoE, zero-computation experts, scaled MLA.

Every layer has two attentions, two dense FFNs and a MoE beside them. Tokens choose 12 of 768
outputs, 256 of which cost nothing; a controller holds the mean at 8 FFN experts. The routed sum is
multiplied by m = 6, the ratio of dense and expert width. Multi-token prediction is left out.
"""

from moebius.model.block.scmoe import ScMoE
from moebius.model.ends.hidden_z import HiddenZ
from moebius.model.ffn.balance import BalanceConfig
from moebius.model.ffn.balance.budget import Budget
from moebius.model.ffn.balance.group import GroupLoss
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.lm import ModelConfig
from moebius.model.mixers.mla import MLA
from moebius.optim.schedules.wsd import WSD
from moebius.recipes.dial import NANO, SMALL, Dial
from moebius.recipes.full_size import STAND_IN, adamw
from moebius.recipes.kin import nano, small
from moebius.train.run import Run
from moebius.train.stages import Stage

WIDTH = 6144
STEP = 8192 * 8192  # tokens


def longcat_flash() -> Run:
    """LongCat-Flash, 560B parameters, 27B of them at work on the mean token."""
    balance = (Budget(), GroupLoss(groups=32))
    return Run(
        name="longcat-flash",
        model=_model(Dial(WIDTH, WIDTH), 28, balance, rope_base=1e6),
        data=STAND_IN,
        # Rate, batch and schedule are not published; the epsilon is (3.1.3).
        optim=adamw(2.2e-4, WSD(warmup=2000, decay="30%", shape="cosine", floor=0.1), eps=1e-16),
        steps=311_490,
        batch=8192,
        sequence_length=8192,
        # Section 3.4: 80B tokens at 32K and 20B at 128K, after more than 20T.
        stages=(
            Stage(310_000 * STEP, 32_768, rope_base=5e6),
            Stage(311_192 * STEP, 131_072, rope_base=1e7),
        ),
        vocab=131_072,
        micro_batch=1,
        recompute=True,
    )


def longcat_nano() -> Run:
    """LongCat-Flash for a CPU: 2 layers, 64 experts and 32 zero experts."""
    # In so short a run scores drift all the way; these gains keep the budget up with them.
    balance = (Budget(mu=0.01, integral=0.02, mean_gain=400.0), GroupLoss())
    return nano("longcat-nano", _model(Dial(NANO, WIDTH), 2, balance))


def longcat_small() -> Run:
    """LongCat-Flash for one GPU: 6 layers, 128 experts and 64 zero experts."""
    return small("longcat-small", _model(Dial(SMALL, WIDTH), 6, (Budget(), GroupLoss())))


def _model(
    dial: Dial, layers: int, balance: tuple[BalanceConfig, ...], rope_base: float = 1e4
) -> ModelConfig:
    mixer = MLA(
        heads=dial.heads(64, 128),
        q_rank=dial.rank(1536),
        kv_rank=dial.rank(512),
        nope_width=dial.head(128),
        rope_width=dial.head(64),
        v_width=dial.head(128),
        rope_base=rope_base,
        scale_correction=True,
    )
    moe = MoE(
        experts=dial.experts(512),
        zero_experts=dial.experts(512) // 2,
        expert_width=dial.ffn(2048),
        top_k=dial.chosen(12),
        ffn_per_token=float(dial.chosen(8)),
        split=6.0,
        balance=balance,
    )
    layer = ScMoE(mixer=mixer, dense=Dense(dial.ffn(12_288)), moe=moe)
    return ModelConfig(width=dial.width, layers=layers * (layer,), ends=(HiddenZ(),))
