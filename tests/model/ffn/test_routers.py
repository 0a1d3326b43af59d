"""Routers: scores, selection with bias and groups, weights; against Python loops and hypothesis."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moebius.model.ffn.routers import Router, RouterConfig, Selection
from moebius.model.ffn.routers.sigmoid import Sigmoid
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.part import Site
from moebius.model.weight import initialise

from .reference import noise, relative

WIDTH, OUTPUTS, TOKENS = 8, 12, 40
KINDS = [Softmax, Sigmoid]


def build(config: RouterConfig, top_k: int = 3, outputs: int = OUTPUTS) -> Router:
    router = config.build(Site(WIDTH, 2, 0, 1e-5), outputs, top_k)
    initialise(router, 0)
    return router.double()


def weight_of(router: Router) -> Tensor:
    return dict(router.named_parameters())["w_ED"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("renormalise", [False, True])
def test_scores_and_weights_equal_loops(kind: type, renormalise: bool) -> None:
    router = build(kind(renormalise=renormalise))
    x_ND, bias_E = noise(TOKENS, WIDTH), noise(OUTPUTS, seed=1) * 0.1
    route = router(x_ND, bias_E)
    for n, x_D in enumerate(x_ND.tolist()):
        rows = weight_of(router).tolist()
        logits = [sum(a * b for a, b in zip(row, x_D, strict=True)) for row in rows]
        if kind is Softmax:
            scores = [math.exp(z) / sum(math.exp(other) for other in logits) for z in logits]
        else:
            scores = [1 / (1 + math.exp(-z)) for z in logits]
        biased = [score + bias for score, bias in zip(scores, bias_E.tolist(), strict=True)]
        best = sorted(range(OUTPUTS), key=biased.__getitem__, reverse=True)[:3]
        gates = [scores[e] for e in best]
        if renormalise:
            gates = [gate / sum(gates) for gate in gates]
        assert route.logit_NE[n].tolist() == pytest.approx(logits)
        assert route.score_NE[n].tolist() == pytest.approx(scores)
        assert route.index_NS[n].tolist() == best
        assert route.weight_NS[n].tolist() == pytest.approx(gates)


@pytest.mark.parametrize("kind", KINDS)
def test_bias_moves_the_selection_and_never_the_weights(kind: type) -> None:
    router = build(kind())
    x_ND = noise(TOKENS, WIDTH)
    free = router(x_ND, torch.zeros(OUTPUTS))
    bias_E = torch.zeros(OUTPUTS)
    bias_E[:2] = 10.0
    pushed = router(x_ND, bias_E)
    assert (pushed.index_NS[:, :2].sort().values == torch.tensor([0, 1])).all()
    assert not torch.equal(free.index_NS, pushed.index_NS)
    assert torch.equal(free.score_NE, pushed.score_NE)
    assert torch.equal(pushed.weight_NS, free.score_NE.gather(-1, pushed.index_NS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("renormalise", [False, True])
def test_no_gradient_reaches_the_bias(kind: type, renormalise: bool) -> None:
    router = build(kind(renormalise=renormalise))
    bias_E = (noise(OUTPUTS, seed=1) * 0.1).requires_grad_()
    route = router(noise(TOKENS, WIDTH), bias_E)
    weighted = (route.weight_NS * noise(TOKENS, 3, seed=2)).sum()
    grads = torch.autograd.grad(weighted, [bias_E, weight_of(router)], allow_unused=True)
    assert grads[0] is None
    assert grads[1].norm() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_weights_equals_finite_differences(kind: type) -> None:
    router = build(kind(renormalise=True), top_k=2, outputs=5)
    x_ND = noise(4, WIDTH).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: router(x, torch.zeros(5)).weight_NS, (x_ND,))


@pytest.mark.parametrize("kind", KINDS)
def test_routing_is_fp32_under_bf16_activations(kind: type) -> None:
    router = build(kind()).float()
    x_ND = noise(TOKENS, WIDTH).bfloat16()
    route = router(x_ND, torch.zeros(OUTPUTS))
    assert {route.logit_NE.dtype, route.score_NE.dtype, route.weight_NS.dtype} == {torch.float32}
    exact_NE = x_ND.double() @ weight_of(router).double().T
    rounded_NE = (x_ND @ weight_of(router).bfloat16().T).double()
    assert relative(route.logit_NE.double(), exact_NE) < 1e-6
    assert relative(rounded_NE, exact_NE) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_fp64_is_never_forced_down(kind: type) -> None:
    route = build(kind())(noise(TOKENS, WIDTH), torch.zeros(OUTPUTS))
    assert {route.logit_NE.dtype, route.score_NE.dtype, route.weight_NS.dtype} == {torch.float64}


@st.composite
def grouped(draw: st.DrawFn) -> tuple[Selection, list[list[float]], list[float]]:
    """A selection over groups, scores of some tokens, and a bias."""
    num_groups = draw(st.integers(1, 5))
    size = draw(st.integers(1, 4))
    top_groups = draw(st.integers(1, num_groups))
    top_k = draw(st.integers(1, top_groups * size))
    outputs, tokens, seed = num_groups * size, draw(st.integers(1, 4)), draw(st.integers(0, 9999))
    scores = noise(tokens, outputs, seed=seed).sigmoid()
    bias = noise(outputs, seed=seed + 1) * draw(st.sampled_from([0.0, 0.1, 1.0]))
    return Selection(top_k, False, num_groups, top_groups), scores.tolist(), bias.tolist()


def limited_by_loops(selection: Selection, scores: list[float], bias: list[float]) -> list[int]:
    """DeepSeek-V3: a group scores the sum of its two best experts; only the best groups count."""
    biased = [score + move for score, move in zip(scores, bias, strict=True)]
    size = len(scores) // selection.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(selection.num_groups)]
    worth = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in groups]
    best = sorted(range(len(groups)), key=worth.__getitem__, reverse=True)[: selection.top_groups]
    allowed = [e for g in best for e in groups[g]]
    return sorted(allowed, key=biased.__getitem__, reverse=True)[: selection.top_k]


@given(grouped())
@settings(max_examples=150, deadline=None)
def test_group_limited_selection_equals_loops(
    case: tuple[Selection, list[list[float]], list[float]],
) -> None:
    selection, scores, bias = case
    score_NE = torch.tensor(scores, dtype=torch.float64)
    route = selection(score_NE.log(), score_NE, torch.tensor(bias, dtype=torch.float64))
    wanted = [limited_by_loops(selection, row, bias) for row in scores]
    assert route.index_NS.tolist() == wanted
    assert route.weight_NS.tolist() == [
        [row[e] for e in chosen] for row, chosen in zip(scores, wanted, strict=True)
    ]


def test_groups_limit_what_a_free_selection_would_take() -> None:
    """The best expert of all stands in the group whose best pair is the weakest but one."""
    score_NE = torch.tensor([[0.9, 0.1, 0.8, 0.3, 0.7, 0.6]])
    chosen = [
        Selection(3, num_groups=3, top_groups=groups)(score_NE, score_NE, torch.zeros(6)).index_NS
        for groups in (3, 2)
    ]
    assert [index_NS.tolist() for index_NS in chosen] == [[[0, 2, 4]], [[2, 4, 5]]]


@given(st.integers(2, 12), st.integers(0, 2**16), st.data())
@settings(max_examples=60, deadline=None)
def test_every_token_gets_distinct_experts(outputs: int, seed: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, outputs))
    score_NE = noise(6, outputs, seed=seed).softmax(-1)
    route = Selection(top_k)(score_NE.log(), score_NE, noise(outputs, seed=seed + 1))
    assert route.index_NS.shape == (6, top_k)
    assert all(len(set(row)) == top_k for row in route.index_NS.tolist())
    assert route.index_NS.min() >= 0 and route.index_NS.max() < outputs
