"""Which weights are multiplied in a low-precision format: by role, and never the router's."""

import copy

import pytest
import torch

from moebius.model.block.prenorm import PreNorm
from moebius.model.context import Context
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.lm import LM, ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.model.weight import check_products, initialise, named_weights, set_products
from moebius.monitor.meters import Meter
from moebius.monitor.tap import observing
from moebius.ops.formats import Product
from moebius.ops.formats.fp8 import FP8
from moebius.ops.formats.nvfp4 import NVFP4


def model() -> LM:
    heads = GQA(2, 1, 8)
    moe = MoE(experts=4, top_k=2, expert_width=16)
    lm = ModelConfig(16, (PreNorm(heads, Dense(24)), PreNorm(heads, moe))).build(30)
    initialise(lm, 0)
    return lm


def loss_of(lm: LM, recompute: bool = False) -> torch.Tensor:
    tokens_BT = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(0))
    ctx = Context.continuing(tokens_BT, 0)
    return lm.loss(tokens_BT, tokens_BT.roll(-1, 1), ctx, recompute=recompute).total / 24


def test_products_go_to_the_weights_of_their_role() -> None:
    lm = model()
    set_products(lm, {"expert": Product(NVFP4()), "matrix": None})
    for name, weight in named_weights(lm):
        assert weight.product == (Product(NVFP4()) if weight.role == "expert" else None), name
    set_products(lm, {})
    assert all(weight.product is None for _, weight in named_weights(lm))


def test_a_deep_copy_keeps_them() -> None:
    lm = model()
    set_products(lm, {"matrix": Product(FP8())})
    for (name, weight), (_, twin) in zip(
        named_weights(lm), named_weights(copy.deepcopy(lm)), strict=True
    ):
        assert twin.product == weight.product and twin.watch() is None, name


@pytest.mark.parametrize("role", ["matrix", "expert"])
def test_a_role_changes_its_own_products(role: str) -> None:
    lm = model()
    plain = loss_of(lm)
    set_products(lm, {role: Product(NVFP4())})
    rounded = loss_of(lm)
    assert rounded != plain
    torch.testing.assert_close(rounded, plain, rtol=0.05, atol=0)
    set_products(lm, {})
    assert loss_of(lm) == plain


@pytest.mark.parametrize(
    ("role", "says"),
    [
        ("router", "the router stays in fp32"),
        ("head", "leave head out"),
        ("norm", "no matrix product; name matrix or expert"),
        ("embedding", "no matrix product"),
        ("experts", "there is no role 'experts'; did you mean 'expert'"),
    ],
)
def test_other_roles_are_refused(role: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_products({role: Product(FP8())})


@pytest.mark.parametrize("recompute", [False, True])
def test_every_weight_shows_what_rounding_lost(recompute: bool) -> None:
    lm, meter = model(), Meter()
    set_products(lm, dict.fromkeys(("matrix", "expert"), Product(NVFP4())))
    with observing(meter):
        loss = loss_of(lm, recompute)
    loss.backward()
    found = meter.rounding()
    kinds = ("outliers", "saturated", "underflow")
    assert list(found) == [f"{kind}/{what}" for kind in kinds for what in ("dy", "w", "x")]
    for name, share in found.items():
        assert 0 <= share["mean"] <= share["max"] <= 1, name
        assert lm.get_parameter(share["at"]).role in ("matrix", "expert")  # pyright: ignore
    assert found["underflow/x"]["mean"] > 0


def test_recompute_gives_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        lm = model()
        set_products(lm, dict.fromkeys(("matrix", "expert"), Product(NVFP4())))
        loss_of(lm, recompute).backward()
        grads.append({name: weight.grad for name, weight in named_weights(lm)})
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())
