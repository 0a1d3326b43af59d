"""Counting by building: LongCat-Flash at its published size, and products as torch counts them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moebius.model.block.prenorm import PreNorm
from moebius.model.block.scmoe import ScMoE
from moebius.model.context import Context
from moebius.model.count import GROUPS, Counts, count, count_config, count_groups, uses
from moebius.model.ends.mtp import MTP
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.mla import MLA
from moebius.model.mixers.swa import SWA
from moebius.model.weight import initialise, named_weights

from .inputs import tokens

D, V, LAYERS = 6144, 131072, 28
LONGCAT = ModelConfig(
    width=D,
    layers=LAYERS
    * (
        ScMoE(
            MLA(64, 1536, 512, 128, 64, 128, rope_base=1e7, scale_correction=True),
            Dense(12288),
            MoE(512, 2048, 12, zero_experts=256, ffn_per_token=8.0, scaling=6.0),
        ),
    ),
)
SMALL = GQA(4, 2, 8)


@pytest.fixture(scope="module")
def longcat() -> Counts:
    return count_config(LONGCAT, V, context=8192)


def test_longcat_flash_has_its_published_size(longcat: Counts) -> None:
    billions = [round(n / 1e9, 2) for n in (longcat.total, longcat.active_min)]
    assert billions == [560.66, 18.69]
    billions = [round(n / 1e9, 2) for n in (longcat.active_mean, longcat.active_max)]
    assert billions == [27.15, 31.38]


def test_longcat_flash_by_arithmetic(longcat: Counts) -> None:
    q, kv = D * 1536 + 1536 * 64 * 192, D * (512 + 64) + 512 * 64 * (128 + 128)
    attention = q + kv + 64 * 128 * D
    dense, expert, router = 3 * D * 12288, 3 * D * 2048, 768 * D
    norms = 4 * D + 2 * (1536 + 512)
    always = LAYERS * (2 * attention + 2 * dense + router + norms) + D + V * D
    assert longcat.total == always + LAYERS * 512 * expert + V * D
    active = (longcat.active_min, longcat.active_mean, longcat.active_max)
    assert active == tuple(always + LAYERS * experts * expert for experts in (0, 8, 12))
    vectors = LAYERS * norms + D
    assert longcat.flops_weights == 2.0 * (longcat.active_mean - vectors)
    # Scores of 192 and values of 128 wide, two FLOPs each, over half of the context.
    assert longcat.flops_mixing == 2 * LAYERS * 64 * (192 + 128) * 2 * 8192 / 2
    assert longcat.flops_train == 3 * (longcat.flops_weights + longcat.flops_mixing)


def test_a_tied_head_counts_once() -> None:
    layers = (PreNorm(SMALL, Dense(16)),)
    free, tied = (count_config(ModelConfig(32, layers, tied=t), 100, 8) for t in (False, True))
    assert free.total - tied.total == 100 * 32
    assert free.active_mean == tied.active_mean and free.flops_weights == tied.flops_weights


def test_shared_experts_and_budgets() -> None:
    plain = PreNorm(SMALL, MoE(4, 16, 3))
    shared = PreNorm(SMALL, MoE(4, 16, 3, shared_experts=2))
    budget = PreNorm(SMALL, MoE(4, 16, 3, zero_experts=4, ffn_per_token=1.5))
    of_plain, of_shared, of_budget = (
        count_config(ModelConfig(32, (layer,)), 100, 8) for layer in (plain, shared, budget)
    )
    expert = 3 * 16 * 32
    assert of_plain.active_min == of_plain.active_mean == of_plain.active_max
    assert of_shared.active_mean - of_plain.active_mean == 2 * expert
    router = 4 * 32
    assert of_budget.total - of_plain.total == router
    assert of_plain.active_mean + router - of_budget.active_mean == 1.5 * expert
    assert of_plain.active_mean + router - of_budget.active_min == 3 * expert
    assert of_plain.active_mean + router == of_budget.active_max


def test_a_top_k_beyond_the_ffn_experts_uses_each_once() -> None:
    layer = PreNorm(SMALL, MoE(2, 16, 4, zero_experts=4, ffn_per_token=1.0))
    counts = count_config(ModelConfig(32, (layer,)), 100, 8)
    assert counts.active_max - counts.active_min == 2 * 3 * 16 * 32


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_weights_are_those_torch_counts(tied: bool) -> None:
    """Of a dense model: all products but those of attention, which torch counts apart."""
    layers = (PreNorm(SMALL, Dense(48)), PreNorm(SWA(4, 4, 8, window=3), Dense(16)))
    lm = ModelConfig(32, layers, tied=tied).build(100)
    initialise(lm, 0)
    tokens_BT, targets_BT = tokens(2, 8, 100)
    with FlopCounterMode(display=False) as counter:
        lm.loss(tokens_BT, targets_BT, Context.continuing(tokens_BT, 0))
    flops = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in flops.items() if str(op) in ("aten.mm", "aten.addmm"))
    assert products == 2 * 8 * count(lm, 8).flops_weights


def test_window_bounds_the_flops_of_mixing() -> None:
    near, far = (
        count_config(ModelConfig(32, (PreNorm(SWA(4, 2, 8, window=64), Dense(16)),)), 100, context)
        for context in (4096, 65536)
    )
    full = count_config(ModelConfig(32, (PreNorm(SMALL, Dense(16)),)), 100, 65536)
    assert near.flops_mixing == far.flops_mixing == 4 * 4 * 8 * 64
    assert full.flops_mixing == 4 * 4 * 8 * 65536 / 2


def test_mtp_weights_are_counted() -> None:
    layers = (PreNorm(SMALL, Dense(16)),)
    without = count_config(ModelConfig(32, layers), 100, 8)
    having = count_config(ModelConfig(32, layers, ends=(MTP(SMALL, Dense(16)),)), 100, 8)
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 16 * 32
    assert having.total - without.total == 2 * 32 * 32 + block + 5 * 32


def test_every_weight_belongs_to_one_group() -> None:
    moe = MoE(4, 16, 2, shared_experts=1, router=Softmax(bias=True), bias=True)
    layers = (PreNorm(GQA(4, 2, 8, qk_norm="head"), Dense(16)), PreNorm(SMALL, moe))
    config = ModelConfig(32, layers, ends=(MTP(SMALL, Dense(48)),))
    with torch.device("meta"):
        model = config.build(100)
    groups = count_groups(model, 8)
    attention, expert = 2 * 32 * 32 + 2 * 16 * 32, 3 * 16 * 32
    assert {name: counts.total for name, counts in groups.items()} == {
        "embedding": 100 * 32,
        "mixers": 2 * attention,
        "dense": expert,
        "experts": 4 * (expert + 2 * 16 + 32),
        "shared_experts": expert,
        "router": 4 * 32 + 4,
        "norms": 5 * 32 + 2 * 8,
        # Its own join, attention, feed-forward and norms; the head and the embedding are shared.
        "ends": 2 * 32 * 32 + attention + 3 * 48 * 32 + 5 * 32,
        "head": 100 * 32,
    }
    assert [name for name in GROUPS if name in groups] == list(groups)
    experts = groups["experts"]
    assert experts.active_mean == experts.total / 2 and experts.flops_weights == 2 * 2 * expert
    assert groups["embedding"].active_max == 0 and groups["norms"].flops_weights == 0
    whole = count(model, 8)
    assert sum(counts.total for counts in groups.values()) == whole.total
    for name in ("flops_weights", "flops_mixing", "active_mean"):
        assert sum(getattr(c, name) for c in groups.values()) == getattr(whole, name)
    # Scores and values of three attentions, one of them in the end.
    assert groups["mixers"].flops_mixing == 2 * groups["ends"].flops_mixing == 2 * 2 * 32 * 8
    assert whole.flops_backward == 2 * whole.flops_forward


def test_a_tied_matrix_is_the_head() -> None:
    with torch.device("meta"):
        model = ModelConfig(32, (PreNorm(SMALL, Dense(16)),), tied=True).build(100)
    groups = count_groups(model, 8)
    assert "embedding" not in groups and groups["head"].active_mean == 100 * 32


def test_a_use_says_its_weight_and_its_share() -> None:
    with torch.device("meta"):
        model = ModelConfig(32, (PreNorm(SMALL, MoE(8, 16, 2)),)).build(100)
    found = {use.name: use for use in uses(model)}
    assert found["layers.0.ffn.w_down_EDF"].share == (0.25, 0.25, 0.25)
    assert found["layers.0.mixer.heads.w_q"].share == (1.0, 1.0, 1.0)
    assert found["embed.w_VD"].share == (0.0, 0.0, 0.0)
    assert found.keys() == dict(named_weights(model)).keys()
