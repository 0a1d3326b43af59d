"""The language model: layer patterns, losses, decoding, and the split into micro-batches."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moebius.config import from_json, to_json
from moebius.model.block import BlockOutput
from moebius.model.block.prenorm import PreNorm
from moebius.model.block.scmoe import ScMoE
from moebius.model.context import Context
from moebius.model.ends.hidden_z import HiddenZ
from moebius.model.ends.mtp import MTP
from moebius.model.ffn.balance.budget import Budget
from moebius.model.ffn.balance.group import GroupLoss
from moebius.model.ffn.balance.router_z import RouterZ
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.lm import LM, ModelConfig
from moebius.model.mixers import MixerConfig
from moebius.model.mixers.cla import CLA, shared
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.mla import MLA
from moebius.model.mixers.swa import SWA
from moebius.model.weight import initialise, named_weights

from .inputs import context, noise, rows_of, tokens

VOCAB, WIDTH = 30, 16
LATENT = MLA(heads=2, q_rank=8, kv_rank=6, nope_width=4, rope_width=4, v_width=6)
MOE = MoE(
    experts=4,
    expert_width=8,
    top_k=3,
    zero_experts=2,
    ffn_per_token=2.0,
    balance=(Budget(), GroupLoss(0.1, scope="sequence"), RouterZ(0.1)),
)
LOCAL = PreNorm(SWA(2, 1, 8, window=3), Dense(24))
FULL = PreNorm(GQA(2, 1, 8), MOE)
CONFIG = ModelConfig(
    WIDTH,
    3 * (LOCAL,) + (FULL,) + (ScMoE(LATENT, Dense(20), MOE),),
    ends=(MTP(GQA(2, 1, 8), Dense(12)), HiddenZ(0.1)),
)


def built(config: ModelConfig = CONFIG) -> LM:
    lm = config.build(VOCAB)
    initialise(lm, 0)
    return lm


def grads_of(lm: LM) -> dict[str, Tensor]:
    grads = {name: w.grad.clone() for name, w in named_weights(lm) if w.grad is not None}
    for weight in lm.parameters():
        weight.grad = None
    return grads


def test_a_layer_pattern_is_plain_data() -> None:
    lm = built()
    kinds = [[type(mixer).__name__ for mixer in block.mixers()] for block in lm.blocks()]
    assert kinds == [["Attention"]] * 4 + [["_MLA", "_MLA"]]
    windows = [block.mixers()[0].window for block in lm.blocks()[:4]]  # pyright: ignore
    assert None not in windows[:3] and windows[3] is None
    assert from_json(ModelConfig, json.loads(json.dumps(to_json(CONFIG)))) == CONFIG


KEYS, KEYS_OF_IT = shared(GQA(2, 1, 8), 2)
CODES, CODES_OF_IT = shared(LATENT, 2)


def plain(*mixers: MixerConfig) -> ModelConfig:
    """A layer of each mixer, in a row."""
    return ModelConfig(WIDTH, tuple(PreNorm(mixer, Dense(12)) for mixer in mixers))


@pytest.mark.parametrize(
    ("config", "lengths"),
    [
        (CONFIG, [1, 1, 1, 1, 1]),
        (plain(*shared(GQA(2, 1, 8), 3), *shared(LATENT, 2)), [3, 2]),
        (plain(KEYS, GQA(2, 1, 8), KEYS_OF_IT, GQA(2, 1, 8)), [3, 1]),
        (plain(KEYS, KEYS, KEYS_OF_IT), [1, 2]),
        (plain(LATENT, KEYS, CODES, KEYS_OF_IT, CODES_OF_IT), [1, 4]),
        (plain(CODES, KEYS, KEYS_OF_IT, CODES_OF_IT, KEYS_OF_IT), [5]),
    ],
)
def test_units_keep_lenders_and_borrowers_together(config: ModelConfig, lengths: list[int]) -> None:
    units = built(config).units()
    assert [len(unit) for unit in units] == lengths
    assert [i for unit in units for i in unit] == list(range(len(config.layers)))


@torch.no_grad()
def test_a_borrower_reads_the_nearest_lender() -> None:
    lm = built(plain(CODES, KEYS, KEYS, KEYS_OF_IT, CODES_OF_IT))
    borrowed: list[dict[str, Tensor]] = []
    lent: list[dict[str, Tensor]] = []

    def watch(block: nn.Module, given: tuple[Any, ...], out: BlockOutput) -> None:
        borrowed.append(given[3])
        lent.append(out.lent)

    for block in lm.blocks():
        block.register_forward_hook(watch)
    lm(tokens(1, 6, VOCAB)[0], context((6,)))
    assert [sorted(each) for each in lent[:3]] == [
        ["latents", "rotated_keys"],
        *2 * [["keys", "values"]],
    ]
    assert borrowed[3]["keys"] is lent[2]["keys"] and borrowed[3]["values"] is lent[2]["values"]
    assert borrowed[4]["latents"] is lent[0]["latents"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (plain(KEYS_OF_IT), r"layers\.0 borrows 'keys', which no layer before it lends"),
        (plain(GQA(2, 1, 8), KEYS_OF_IT), r"layers\.1 borrows 'keys'"),
        (plain(KEYS, CODES_OF_IT), r"layers\.1 borrows 'latents'"),
        (
            plain(KEYS, SWA(2, 1, 8, window=3), CLA(GQA(2, 2, 4), borrows=True)),
            r"layers\.2 cannot borrow 'keys' of layers\.0: kv_heads is 1 there, 2 here; "
            "head_width is 8 there, 4 here$",
        ),
        (
            plain(KEYS, CLA(GQA(2, 1, 8, rope_base=1e4), borrows=True)),
            "rope_base is 500000.0 there",
        ),
        (
            plain(KEYS, CLA(SWA(2, 1, 8, window=3, rope_base=5e5), borrows=True)),
            "window is None there, 3 here$",
        ),
        (
            plain(CODES, CLA(dataclasses.replace(LATENT, kv_rank=5), borrows=True)),
            "kv_rank is 6 there, 5 here$",
        ),
        (
            dataclasses.replace(plain(KEYS), ends=(MTP(KEYS_OF_IT, Dense(12)),)),
            r"ends\.0 borrows from a layer",
        ),
        (ModelConfig(WIDTH, (ScMoE(CODES, Dense(12), MOE),)), "ScMoE builds two mixers"),
        (ModelConfig(WIDTH, (PreNorm(CODES, MOE), ScMoE(CODES_OF_IT, Dense(12), MOE))), "ScMoE"),
    ],
)
def test_a_borrower_without_its_lender_is_refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.build(VOCAB)


def test_heads_may_differ_within_a_group() -> None:
    """Only what is shared must be alike."""
    many = CLA(GQA(4, 1, 8, qk_norm="head", bias=True), borrows=True)
    lm = built(plain(KEYS, many))
    tokens_BT, targets_BT = tokens(2, 6, VOCAB)
    lm.loss(tokens_BT, targets_BT, context((6,), (2, 4))).total.backward()
    assert all(grad.isfinite().all() for grad in grads_of(lm).values())


def test_layers_of_one_pattern_have_weights_of_their_own() -> None:
    first, second = built().blocks()[:2]
    for (name, weight), other in zip(named_weights(first), second.parameters(), strict=True):
        assert weight is not other and ("norm" in name or not torch.equal(weight, other))


def test_residual_writes_shrink_with_their_number() -> None:
    """2 a pre-norm layer, 5 a ScMoE layer: 4 * 2 + 5."""
    w_down = built().get_parameter("layers.0.ffn.w_down")
    assert w_down.init_std == (24 * 13) ** -0.5  # pyright: ignore


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.layers is empty"):
        ModelConfig(WIDTH, ()).build(VOCAB)


@pytest.mark.parametrize("tied", [False, True])
def test_the_reported_loss_is_pure_cross_entropy(tied: bool) -> None:
    """Ends, balance rules and z-losses move gradients, never the loss."""
    lm = built(dataclasses.replace(CONFIG, tied=tied))
    tokens_BT, targets_BT = tokens(2, 12, VOCAB)
    ctx = context((5, 7), (12,), padded=3)
    loss = lm.loss(tokens_BT, targets_BT, ctx)
    loss.total.backward()
    with_ends = grads_of(lm)
    logits_BTV = lm.logits(lm(tokens_BT, ctx).hidden_BTD)
    nll_BT = -logits_BTV.log_softmax(-1).gather(-1, targets_BT[..., None])[..., 0]
    torch.testing.assert_close(loss.total, nll_BT[ctx.valid_BT].sum())
    bare = lm.loss(tokens_BT, targets_BT, ctx, with_ends=False)
    bare.total.backward()
    assert torch.equal(bare.total, loss.total)
    assert set(loss.sums) == {"mtp_1", "mtp_1_targets", "hidden_z"} and not bare.sums
    name = "embed.w_VD" if tied else "head.w_VD"
    assert not torch.equal(grads_of(lm)[name], with_ends[name])


@pytest.mark.parametrize(
    ("size", "recompute"), [(4, False), (2, False), (1, False), (2, True)], ids=str
)
def test_micro_batches_add_up(size: int, recompute: bool) -> None:
    """Gradients, loss, sums and stats of 8 sequences whole, and in parts of `size`."""
    lm = built().double()
    tokens_BT, targets_BT = tokens(8, 12, VOCAB)
    ctx = context(*4 * [(12,), (5, 7)], padded=2)

    def run(parts: list[slice]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
        sums: dict[str, Tensor] = {}
        counts: list[Tensor] = []
        for rows in parts:
            part = rows_of(ctx, rows)
            loss = lm.loss(
                *(tokens_BT[rows], targets_BT[rows], part), dtype=torch.float64, recompute=recompute
            )
            (loss.total / part.num_targets).backward()
            for name, value in {"loss": loss.total.detach(), **loss.sums}.items():
                sums[name] = sums.get(name, torch.zeros(())) + value
            found = [each.count_E for layer in loss.stats for each in layer]
            counts = [a + b for a, b in zip(counts, found, strict=True)] if counts else found
        return grads_of(lm), sums, counts

    whole, sums, counts = run([slice(0, 8)])
    parts, part_sums, part_counts = run([slice(i, i + size) for i in range(0, 8, size)])
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-9, atol=1e-12, msg=name)
    for name, value in sums.items():
        torch.testing.assert_close(part_sums[name], value, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(counts, part_counts, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(1,) * 10, (10,), (4, 1, 5), (7, 3)], ids=str)
def test_decoding_equals_the_whole_sequence(chunks: tuple[int, ...]) -> None:
    lm = built().eval()
    tokens_BT, _ = tokens(2, 10, VOCAB)
    want_BTD = lm(tokens_BT, Context.continuing(tokens_BT, 0), dtype=torch.float64).hidden_BTD
    states = lm.init_states(2, torch.float64, torch.device("cpu"))
    assert [len(layer) for layer in states] == [1, 1, 1, 1, 2]
    seen, outputs = 0, []
    for part_BT in tokens_BT.split(list(chunks), dim=1):
        out = lm(part_BT, Context.continuing(part_BT, seen), states, dtype=torch.float64)
        assert out.states is not None
        states, seen = out.states, seen + part_BT.shape[1]
        outputs.append(out.hidden_BTD)
    torch.testing.assert_close(torch.cat(outputs, dim=1), want_BTD, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_precision_is_an_argument(dtype: torch.dtype) -> None:
    """Activations take it, master weights and their gradients stay fp32, the loss at least fp32."""
    lm = built()
    tokens_BT, targets_BT = tokens(2, 12, VOCAB)
    ctx = context((12,), (5, 7))
    assert lm(tokens_BT, ctx, dtype=dtype).hidden_BTD.dtype == dtype
    loss = lm.loss(tokens_BT, targets_BT, ctx, dtype=dtype)
    assert loss.total.dtype == torch.promote_types(dtype, torch.float32)
    loss.total.backward()
    assert {weight.grad.dtype for weight in lm.parameters() if weight.grad is not None} == {
        torch.float32
    }
    reference = lm.loss(tokens_BT, targets_BT, ctx).total
    torch.testing.assert_close(loss.total.float(), reference, rtol=1e-2, atol=0)


def test_a_loss_starts_near_the_uniform_distribution() -> None:
    lm = built()
    tokens_BT, targets_BT = tokens(4, 12, VOCAB)
    total = lm.loss(tokens_BT, targets_BT, context(*4 * [(12,)])).total
    expected = torch.log(torch.tensor(float(VOCAB)))
    torch.testing.assert_close(total / 48, expected, rtol=0.02, atol=0)


def test_what_follows_a_document_does_not_move_it() -> None:
    lm = built().eval()
    tokens_BT, _ = tokens(1, 12, VOCAB)
    ctx = context((5, 7))
    before = lm(tokens_BT, ctx, dtype=torch.float64).hidden_BTD
    tokens_BT[:, 5:] = (tokens_BT[:, 5:] + 1) % VOCAB
    after = lm(tokens_BT, ctx, dtype=torch.float64).hidden_BTD
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=1e-12, atol=1e-12)
    assert not torch.equal(after[:, 5:], before[:, 5:])


def test_hidden_states_are_those_before_the_final_norm() -> None:
    lm = built()
    hidden_BTD = noise(1, 3, WIDTH, dtype=torch.float32)
    scaled = lm.logits(7 * hidden_BTD)
    torch.testing.assert_close(scaled, lm.logits(hidden_BTD), rtol=1e-3, atol=1e-4)
