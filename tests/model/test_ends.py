"""Heads and ends against closed forms: embedding, loss, hidden z-loss, multi-token prediction."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.model.context import Context
from moebius.model.ends.head import Embedding, Head
from moebius.model.ends.hidden_z import HiddenZ
from moebius.model.ends.mtp import MTP
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.mixers.gqa import GQA
from moebius.model.part import Site
from moebius.model.weight import initialise

from . import formulas
from .inputs import context, noise, tokens

WIDTH, VOCAB = 16, 30
SITE = Site(WIDTH, 2, 3, 1e-5)


def ends_of_table(tied: bool = False) -> tuple[Embedding, Head]:
    embed = Embedding(VOCAB, WIDTH, tied)
    head = Head(VOCAB, WIDTH, 1e-5, embed.w_VD if tied else None)
    initialise(embed, 1)
    initialise(head, 2)
    with torch.no_grad():
        head.norm.w_D.add_(0.3 * noise(WIDTH, seed=8, dtype=torch.float32))
    return embed.double(), head.double()


def log_likelihood(h_D: Tensor, w_VD: Tensor, target: int) -> Tensor:
    logit_V = w_VD @ h_D
    return logit_V[target] - logit_V.exp().sum().log()


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_its_formula(tied: bool) -> None:
    _, head = ends_of_table(tied)
    hidden_BTD, (_, targets_BT) = noise(2, 5, WIDTH), tokens(2, 5, VOCAB)
    valid_BT = torch.rand(2, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    loss = head.loss(hidden_BTD, targets_BT, valid_BT)
    want = torch.zeros((), dtype=torch.float64)
    for b, t in valid_BT.nonzero().tolist():
        h_D = formulas.rms(hidden_BTD[b, t], head.norm.w_D, 1e-5)
        want = want - log_likelihood(h_D, head.w_VD, int(targets_BT[b, t]))
    torch.testing.assert_close(loss, want)
    logits = head.logits(hidden_BTD).log_softmax(-1).gather(-1, targets_BT[..., None])[..., 0]
    torch.testing.assert_close(-logits[valid_BT].sum(), want)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_begin_with_unit_variance_and_logits_small(tied: bool) -> None:
    embed = Embedding(500, 256, tied)
    head = Head(500, 256, 1e-5, embed.w_VD if tied else None)
    initialise(embed, 1)
    if not tied:
        initialise(head, 2)
    initialise(head.norm, 3)
    x_BTD = embed(torch.arange(500)[None], torch.float32)
    assert abs(float(x_BTD.detach().std()) - 1) < 0.02
    logits_BTV = head.logits(noise(1, 50, 256, dtype=torch.float32))
    assert float(logits_BTV.detach().std()) < 1.1


def test_a_tied_head_is_the_embedding() -> None:
    embed, head = Embedding(VOCAB, WIDTH, True), None
    head = Head(VOCAB, WIDTH, 1e-5, embed.w_VD)
    assert head.w_VD is embed.w_VD and embed.w_VD.role == "head"
    assert Embedding(VOCAB, WIDTH, False).w_VD.role == "embedding"


def injected(end: Any, hidden_BTD: Tensor, targets_BT: Tensor, ctx: Context) -> tuple[Any, ...]:
    """Gradients that the end injects: of the hidden states and of its weights; its sums."""
    embed, head = ends_of_table()
    hidden_BTD = hidden_BTD.clone().requires_grad_()
    out_BTD, sums = end(hidden_BTD, targets_BT, ctx, embed, head)
    (0.0 * out_BTD).sum().backward()
    return hidden_BTD.grad, sums, embed, head


def test_hidden_z_is_its_closed_form() -> None:
    """coefficient / count * sum over valid tokens of (log sum exp |z|)^2."""
    ctx = context((6,), (2, 4), padded=2)
    hidden_BTD = 3 * noise(2, 6, WIDTH)
    targets_BT = tokens(2, 6, VOCAB)[1]
    grad_BTD, sums, _, _ = injected(HiddenZ(0.25).build(SITE), hidden_BTD, targets_BT, ctx)
    z_BTD = hidden_BTD.clone().requires_grad_()
    total = z_BTD.abs()[:, :4].exp().sum(-1).log().square().sum()
    (0.25 * total / 8).backward()
    torch.testing.assert_close(sums["hidden_z"], total.detach())
    torch.testing.assert_close(grad_BTD, z_BTD.grad)
    assert grad_BTD[:, :4].all() and not grad_BTD[:, 4:].any()


def test_hidden_z_takes_absolute_values() -> None:
    ctx, targets_BT = context((3,)), tokens(1, 3, VOCAB)[1]
    hidden_BTD = torch.zeros(1, 3, WIDTH, dtype=torch.float64)
    hidden_BTD[..., 0] = -100.0
    _, sums, _, _ = injected(HiddenZ(1.0).build(SITE), hidden_BTD, targets_BT, ctx)
    assert math.isclose(float(sums["hidden_z"]), 3 * 100.0**2, rel_tol=1e-6)


def mtp_formula(
    end: Any, embed: Any, head: Any, hidden_TD: Tensor, tokens_X: Tensor, valid: int
) -> list[list[Tensor]]:
    """The losses of one document's tokens by depth; `tokens_X` are the document's tokens.

    At depth k position t joins the embedding of token t+k to the last depth's state and predicts
    token t+k+1, if the document has one and position t+k still counts (t + k < valid).
    """
    losses: list[list[Tensor]] = []
    h_TD = hidden_TD
    for depth, step in enumerate(end.steps, start=1):
        length = len(tokens_X) - depth
        if length < 1:
            losses.append([])
            continue
        e_TD = formulas.rms(embed.w_VD[tokens_X[depth:]], step.token_norm.w_D, 1e-5)
        h_TD = formulas.rms(h_TD[:length], step.hidden_norm.w_D, 1e-5)
        x_TD = torch.cat([e_TD, h_TD], dim=-1) @ step.w_join.T
        block = step.block
        mixer_in = formulas.rms(x_TD, block.mixer_norm.w_D, 1e-5)
        x_TD = x_TD + formulas.gqa(block.mixer, mixer_in)
        ffn_in = formulas.rms(x_TD, block.ffn_norm.w_D, 1e-5)
        h_TD = x_TD + formulas.swiglu(ffn_in, block.ffn.w_gate_up, block.ffn.w_down)
        out_TD = formulas.rms(h_TD, step.norm.w_D, 1e-5)
        pairs = zip(out_TD, tokens_X[depth + 1 :].tolist(), strict=False)
        found = [-log_likelihood(h_D, head.w_VD, target) for h_D, target in pairs]
        losses.append(found[: max(0, valid - depth)])
    return losses


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("padded", [0, 2])
def test_mtp_is_its_formula(depth: int, padded: int) -> None:
    """Three documents in two sequences, each computed by itself, padding at the end."""
    rows = ((6, 5), (11,))
    ctx = context(*rows, padded=padded)
    tokens_BT, targets_BT = tokens(2, 11, VOCAB)
    hidden_BTD = noise(2, 11, WIDTH)
    end: Any = MTP(GQA(2, 1, 4), Dense(12), depth=depth, weight=0.3).build(SITE)
    initialise(end, 0)
    end.double()
    grad_BTD, sums, embed, head = injected(end, hidden_BTD, targets_BT, ctx)

    h_BTD = hidden_BTD.clone().requires_grad_()
    totals = [torch.zeros((), dtype=torch.float64) for _ in range(depth)]
    counts = depth * [0]
    for b, row in enumerate(rows):
        for start, stop in zip((0, *row), (row[0], 11), strict=False):
            # The token after a document is known (it is its last target) and belongs to it.
            tokens_X = torch.cat([tokens_BT[b, start:stop], targets_BT[b, stop - 1 : stop]])
            valid = min(stop, 11 - padded) - start
            losses = mtp_formula(end, embed, head, h_BTD[b, start:stop], tokens_X, valid)
            for k, found in enumerate(losses):
                totals[k] = totals[k] + sum(found)
                counts[k] += len(found)
    total = torch.stack(totals).sum()
    total.backward()
    for k in range(depth):
        torch.testing.assert_close(sums[f"mtp_{k + 1}"], totals[k].detach())
        assert int(sums[f"mtp_{k + 1}_targets"]) == counts[k] > 0
    assert h_BTD.grad is not None
    torch.testing.assert_close(grad_BTD, 0.3 / float(ctx.num_targets) * h_BTD.grad)


def test_mtp_predicts_only_between_tokens_that_count() -> None:
    """A hole, as a masked prompt leaves it: both the token's target and the next must count."""
    ctx, (_, targets_BT) = context((8,)), tokens(1, 8, VOCAB)
    ctx.valid_BT[0, 3] = False
    end = MTP(GQA(2, 1, 4), Dense(12)).build(SITE)
    initialise(end, 0)
    _, sums, _, _ = injected(end, noise(1, 8, WIDTH), targets_BT, ctx)
    assert int(sums["mtp_1_targets"]) == len([0, 1, 4, 5, 6])


def test_mtp_longer_than_the_sequence_predicts_nothing() -> None:
    ctx, targets_BT = context((2,)), tokens(1, 2, VOCAB)[1]
    end = MTP(GQA(2, 1, 4), Dense(12), depth=3).build(SITE)
    initialise(end, 0)
    _, sums, _, _ = injected(end, noise(1, 2, WIDTH), targets_BT, ctx)
    assert [int(sums[f"mtp_{depth}_targets"]) for depth in (1, 2, 3)] == [1, 0, 0]


def test_mtp_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"depth \(0\) must be at least 1"):
        MTP(GQA(2, 1, 4), Dense(12), depth=0).build(SITE)
    with pytest.raises(ValueError, match="must not have a router"):
        MTP(GQA(2, 1, 4), MoE(4, 8, 2)).build(SITE)
