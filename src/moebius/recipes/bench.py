"""The three shapes that `moebius bench step` is read on: LongCat, Qwen3-MoE and Llama, 256 wide.

Small enough for two cores, of the published proportions: 64 fine experts, top-6, 8 x 512 tokens a
step, plain AdamW for every weight. They are made to be timed, not to learn best.
"""

from moebius.data.config import DataConfig
from moebius.model.block.prenorm import PreNorm
from moebius.model.block.scmoe import ScMoE
from moebius.model.ffn.balance.budget import Budget
from moebius.model.ffn.balance.switch import SwitchLoss
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.mla import MLA
from moebius.optim.schedules.constant import Constant
from moebius.recipes.full_size import adamw
from moebius.train.run import Run


def bench_longcat() -> Run:
    """A LongCat-Flash shape to time: 2 super-layers, 64 experts and 32 zero experts, top-6."""
    mixer = MLA(
        heads=4,
        q_rank=128,
        kv_rank=64,
        nope_width=64,
        rope_width=32,
        v_width=64,
        rope_base=1e7,
        scale_correction=True,
    )
    moe = MoE(
        experts=64,
        zero_experts=32,
        top_k=6,
        ffn_per_token=4.0,
        expert_width=128,
        scaling=6.0,
        balance=(Budget(),),
    )
    layer = ScMoE(mixer=mixer, dense=Dense(512), moe=moe)
    return _run("bench-longcat", ModelConfig(width=256, layers=2 * (layer,)))


def bench_qwen3moe() -> Run:
    """A Qwen3-MoE shape to time: 4 layers, 64 experts, top-6."""
    mixer = GQA(heads=4, kv_heads=2, head_width=64, rope_base=1e6, qk_norm="head")
    moe = MoE(
        experts=64,
        expert_width=128,
        top_k=6,
        router=Softmax(renormalise=True),
        balance=(SwitchLoss(),),
    )
    return _run("bench-qwen3moe", ModelConfig(width=256, layers=4 * (PreNorm(mixer, moe),)))


def bench_llama() -> Run:
    """A Llama shape to time: 4 dense layers."""
    mixer = GQA(heads=4, kv_heads=2, head_width=64, rope_base=1e4)
    return _run("bench-llama", ModelConfig(width=256, layers=4 * (PreNorm(mixer, Dense(768)),)))


def _run(name: str, model: ModelConfig) -> Run:
    return Run(
        name=name,
        model=model,
        data=DataConfig(path="python:stdlib"),
        optim=adamw(1e-3, Constant()),
        steps=1000,
        batch=8,
        sequence_length=512,
        vocab=8192,
    )
