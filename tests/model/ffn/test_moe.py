"""The mixture of experts against plain loops in fp64: values and gradients, and its edge cases."""

import dataclasses
import statistics

import pytest
import torch
from torch import Tensor

from moebius.model.ffn.balance.budget import Budget
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE, MoELayer
from moebius.model.ffn.routers import RouterConfig
from moebius.model.ffn.routers.sigmoid import Sigmoid
from moebius.model.ffn.routers.softmax import Softmax
from moebius.model.part import Site
from moebius.model.weight import initialise

from .reference import build, context, moe_by_loops, noise, weights_of

WIDTH, BATCH, LENGTH = 8, 3, 5

PLAIN = MoE(experts=6, expert_width=5, top_k=2)
FULL = MoE(
    experts=6,
    expert_width=4,
    top_k=3,
    zero_experts=3,
    ffn_per_token=2.0,
    shared_experts=2,
    scaling=2.5,
    split=1.5,
    balance=(Budget(),),
)
CASES = {
    "plain": PLAIN,
    "renormalised": dataclasses.replace(PLAIN, router=Softmax(renormalise=True)),
    "sigmoid": dataclasses.replace(PLAIN, router=Sigmoid(renormalise=True), scaling=2.0),
    "zero experts": dataclasses.replace(FULL, shared_experts=0),
    "all": FULL,
    "all, sigmoid": dataclasses.replace(FULL, router=Sigmoid()),
}


def set_bias(moe: MoELayer, bias_E: Tensor) -> None:
    """Give the first rule, a controller, a bias."""
    held_E = moe.balance_rules()[0].bias_E()
    assert held_E is not None
    held_E.copy_(bias_E)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_plain_loops(case: str) -> None:
    config = CASES[case]
    moe = build(config, WIDTH)
    if config.balance:
        set_bias(moe, noise(moe.layout.num_outputs, seed=3) * 0.1)
    x_BTD = noise(BATCH, LENGTH, WIDTH, seed=1).requires_grad_()
    y_BTD, stats = moe(x_BTD, context(BATCH, LENGTH))
    seen_BTD = noise(BATCH, LENGTH, WIDTH, seed=2)
    (y_BTD * seen_BTD).sum().backward()

    weights, own_BTD = weights_of(moe), x_BTD.detach().clone().requires_grad_()
    want_ND, chosen = moe_by_loops(config, weights, own_BTD.flatten(0, 1), moe.bias_E())
    (want_ND * seen_BTD.flatten(0, 1)).sum().backward()

    torch.testing.assert_close(y_BTD.flatten(0, 1), want_ND)
    torch.testing.assert_close(x_BTD.grad, own_BTD.grad)
    for name, weight in moe.named_parameters():
        want = weights[name].grad
        assert want is not None and want.abs().max() > 0
        torch.testing.assert_close(weight.grad, want, msg=name)
    flat = [e for experts in chosen for e in experts]
    assert stats.count_E.tolist() == [flat.count(e) for e in range(moe.layout.num_outputs)]
    if config.zero_experts:
        assert any(e >= config.experts for e in flat), "no token met a zero expert"


def test_bias_of_several_rules_is_summed() -> None:
    config = dataclasses.replace(FULL, balance=(Budget(), Budget()))
    moe = build(config, WIDTH)
    one_E, two_E = noise(9, seed=1), noise(9, seed=2)
    for rule, bias_E in zip(moe.balance_rules(), (one_E, two_E), strict=True):
        held_E = rule.bias_E()
        assert held_E is not None
        held_E.copy_(bias_E)
    torch.testing.assert_close(moe.bias_E(), one_E + two_E)


@pytest.mark.parametrize("router", [Softmax(), Sigmoid()])
def test_a_token_with_zero_experts_only_is_its_own_scaled_copy(router: RouterConfig) -> None:
    """gamma * sum(gates) * h: the zero part is scaled like the others (sglang issue 10019)."""
    config = dataclasses.replace(FULL, router=router, shared_experts=0)
    moe = build(config, WIDTH)
    bias_E = torch.zeros(moe.layout.num_outputs, dtype=torch.float64)
    bias_E[config.experts :] = 100.0
    set_bias(moe, bias_E)
    x_BTD = noise(BATCH, LENGTH, WIDTH, seed=1)
    y_BTD, stats = moe(x_BTD, context(BATCH, LENGTH))
    logits = x_BTD @ dict(moe.named_parameters())["router.w_ED"].T
    scores = logits.softmax(-1) if isinstance(router, Softmax) else logits.sigmoid()
    gates_BT1 = scores[..., config.experts :].sum(-1, keepdim=True)
    torch.testing.assert_close(y_BTD, 2.5 * 1.5 * gates_BT1 * x_BTD)
    assert stats.hist_S.tolist() == [BATCH * LENGTH, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_expert_is_the_dense_ffn(dtype: torch.dtype) -> None:
    """Forward and backward; the softmax of one logit is 1 (megablocks issue 107)."""
    moe = build(MoE(experts=1, expert_width=16, top_k=1), WIDTH).to(dtype)
    dense = Dense(16).build(Site(WIDTH, 2, 0, 1e-5)).to(dtype)
    own = dict(dense.named_parameters())
    with torch.no_grad():
        own["w_gate_up"].copy_(moe.w_gate_up_E2FD[0])
        own["w_down"].copy_(moe.w_down_EDF[0])
    ctx, x_BTD = context(BATCH, LENGTH), noise(BATCH, LENGTH, WIDTH).to(dtype)
    inputs = [x_BTD.clone().requires_grad_() for _ in range(2)]
    outputs = [module(x, ctx)[0] for module, x in zip((moe, dense), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    for y_BTD in outputs:
        (y_BTD**2).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for grad_E, weight in ((moe.w_gate_up_E2FD.grad, "w_gate_up"), (moe.w_down_EDF.grad, "w_down")):
        assert grad_E is not None
        torch.testing.assert_close(grad_E[0], own[weight].grad)


@pytest.mark.parametrize("top_k", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", [Softmax, Sigmoid])
@pytest.mark.parametrize("renormalise", [False, True])
def test_the_router_learns_for_every_top_k(top_k: int, kind: type, renormalise: bool) -> None:
    config = MoE(6, 4, top_k, router=kind(renormalise=renormalise))
    moe = build(config, WIDTH)
    if top_k == 1 and renormalise:
        with pytest.raises(ValueError, match="no router gradient"):
            moe.router.check_trainable()
        return
    moe.router.check_trainable()
    y_BTD, stats = moe(noise(BATCH, LENGTH, WIDTH), context(BATCH, LENGTH))
    (y_BTD * noise(BATCH, LENGTH, WIDTH, seed=1)).sum().backward()
    grad_ED = dict(moe.named_parameters())["router.w_ED"].grad
    met_E = stats.count_E > 0
    assert met_E.sum() >= 5
    assert grad_ED is not None and (grad_ED.norm(dim=-1)[met_E] > 1e-3).all()


def variance(config: MoE, seed: int) -> float:
    """Output variance of a fresh layer of width 32 on normal input, its gates near uniform."""
    moe = build(config, 32, seed)
    with torch.no_grad():
        dict(moe.named_parameters())["router.w_ED"].mul_(0.2)
        y_BTD, _ = moe(noise(4, 64, 32, seed=100 + seed), context(4, 64))
    return float(y_BTD.var())


@pytest.mark.parametrize("m", [2, 4])
def test_split_experts_keep_the_variance_of_the_unsplit_ones(m: int) -> None:
    """LongCat-Flash eq. 8: m-fold split experts, the output times m."""
    base, split = MoE(16, 32, 4), MoE(16 * m, 32 // m, 4 * m, split=float(m))
    whole = statistics.mean(variance(base, seed) for seed in range(8))
    fine = statistics.mean(variance(split, seed) for seed in range(8))
    assert fine / whole == pytest.approx(1.0, abs=0.1)
    bare = dataclasses.replace(split, scaling=1 / m)
    assert variance(bare, 0) == pytest.approx(variance(split, 0) / m**2)


def test_every_weight_is_initialised_and_has_the_scale_it_declares() -> None:
    moe = FULL.build(Site(64, 4, 0, 1e-5))
    assert all(weight.isnan().all() for weight in moe.parameters())
    initialise(moe, 0)
    weights = dict(moe.named_parameters())
    assert all(weight.isfinite().all() for weight in weights.values())
    wanted = {
        "router.w_ED": 64**-0.5,
        "w_gate_up_E2FD": 64**-0.5,
        "w_down_EDF": (4 * 4 * 1.5) ** -0.5,
        "shared_gate_up": 64**-0.5,
        "shared_down": (8 * 4) ** -0.5,
    }
    assert weights.keys() == wanted.keys()
    for name, std in wanted.items():
        assert float(torch.std(weights[name].data)) == pytest.approx(std, rel=0.12), name


def test_bf16_stays_near_fp64_and_keeps_its_dtype() -> None:
    moe = build(dataclasses.replace(FULL, balance=()), WIDTH).float()
    x_BTD = noise(BATCH, LENGTH, WIDTH).bfloat16()
    y_BTD, _ = moe(x_BTD, context(BATCH, LENGTH))
    exact_BTD, _ = moe.double()(x_BTD.double(), context(BATCH, LENGTH))
    assert y_BTD.dtype == torch.bfloat16
    torch.testing.assert_close(y_BTD.double(), exact_BTD, rtol=0.05, atol=0.05)


def test_two_runs_are_equal_to_the_last_bit() -> None:
    moe = build(FULL, WIDTH).float()
    x_BTD = noise(8, 64, WIDTH).float()

    def run() -> list[Tensor]:
        for weight in moe.parameters():
            weight.grad = None
        y_BTD, _ = moe(x_BTD, context(8, 64))
        (y_BTD**2).sum().backward()
        return [y_BTD, *(w.grad for w in moe.parameters() if w.grad is not None)]

    first, second = run(), run()
    assert len(first) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 7}, "top_k"),
        ({"top_k": 0}, "ffn_per_token"),
        ({"ffn_per_token": 0.0}, "must lie in 0..top_k"),
        ({"ffn_per_token": 2.5}, "must lie in 0..top_k"),
        ({"ffn_per_token": 1.0}, "needs zero_experts"),
        ({"zero_experts": 2}, "nothing reaches them"),
        ({"zero_experts": 1, "top_k": 4, "ffn_per_token": 2.0}, "add more"),
        ({"experts": 1, "zero_experts": 4, "ffn_per_token": 1.5}, "exceeds the 1 experts"),
        ({"router": Softmax(num_groups=4)}, "must divide"),
        ({"router": Softmax(num_groups=3, top_groups=4)}, "top_groups"),
        ({"router": Sigmoid(num_groups=6, top_groups=1)}, "top_k"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build(dataclasses.replace(PLAIN, **change), WIDTH)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "counts"),
    [(PLAIN, (2, 2, 2)), (FULL, (0, 2, 3)), (MoE(8, 4, 4, 2, 3.0), (2, 3, 4))],
)
def test_uses_per_token(config: MoE, counts: tuple[int, int, int]) -> None:
    """Min, mean and max of the experts a token meets, as shares; zero experts meet a token once."""
    shares = build(config, WIDTH).uses_per_token()
    assert shares.keys() == {"w_gate_up_E2FD", "w_down_EDF"}
    for share in shares.values():
        assert share == pytest.approx([count / config.experts for count in counts])
