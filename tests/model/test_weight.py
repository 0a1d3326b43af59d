"""Weights: born NaN, with a role, copied whole, filled from one seeded stream."""

import copy
import math

import pytest
import torch
from torch import nn

from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.dense import Dense
from moebius.model.lm import LM, ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.model.weight import Filling, Weight, initialise, named_weights, unfilled


def model() -> LM:
    return ModelConfig(16, 2 * (PreNorm(GQA(2, 1, 8, qk_norm="head"), Dense(24)),)).build(30)


def test_a_weight_is_born_nan_with_its_role() -> None:
    weight = Weight((3, 4), "expert", std=0.5, blocks=2)
    assert weight.isnan().all() and weight.requires_grad
    assert (weight.role, weight.init_std, weight.constant, weight.blocks) == ("expert", 0.5, 0.0, 2)


def test_results_of_operations_are_plain_tensors() -> None:
    weight = Weight((3, 4), "matrix", std=0.5)
    assert type(weight + 1) is torch.Tensor and type(weight.T) is torch.Tensor


@pytest.mark.parametrize("shape", [(0,), (3, 0), (-1, 2)])
def test_an_empty_weight_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="every width must be at least 1"):
        Weight(shape, "matrix")


def test_a_deep_copy_is_whole_and_apart() -> None:
    lm = model().double()
    initialise(lm, 0)
    lm.head.w_VD.requires_grad_(False)
    twin = copy.deepcopy(lm)
    for (name, weight), (other, same) in zip(named_weights(lm), named_weights(twin), strict=True):
        assert name == other and torch.equal(weight, same) and weight.dtype == same.dtype
        assert weight is not same and weight.data_ptr() != same.data_ptr()
        kept = ("role", "init_std", "constant", "blocks", "requires_grad")
        assert all(getattr(weight, key) == getattr(same, key) for key in kept), name


def test_a_deep_copy_keeps_a_tied_head_tied() -> None:
    lm = ModelConfig(16, (PreNorm(GQA(2, 1, 8), Dense(24)),), tied=True).build(30)
    twin = copy.deepcopy(lm)
    assert twin.head.w_VD is twin.embed.w_VD and twin.head.w_VD is not lm.head.w_VD


def filled(seed: int) -> dict[str, torch.Tensor]:
    lm = model()
    initialise(lm, seed)
    return {name: weight.detach().clone() for name, weight in named_weights(lm)}


def test_initialise_is_a_function_of_the_seed() -> None:
    torch.manual_seed(1)
    first = filled(0)
    torch.manual_seed(2)
    for name, weight in filled(0).items():
        assert torch.equal(weight, first[name]), name
    other = filled(1)
    moved = {name for name, weight in first.items() if not torch.equal(weight, other[name])}
    assert moved == {name for name in first if "norm" not in name}


def test_initialise_draws_nothing_from_the_global_stream() -> None:
    before = torch.get_rng_state()
    filled(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_initialise_does_not_depend_on_default_device_or_dtype() -> None:
    want, lm, wide = filled(0), model(), model().double()
    with torch.device("meta"):
        initialise(lm, 0)
    torch.set_default_dtype(torch.float64)
    try:
        initialise(wide, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, weight in want.items():
        assert torch.equal(lm.get_parameter(name), weight), name
        # The product with std is then rounded later.
        torch.testing.assert_close(wide.get_parameter(name).float(), weight, rtol=1e-6, atol=0)


def test_weights_have_the_deviation_they_declare() -> None:
    lm = ModelConfig(128, (PreNorm(GQA(4, 4, 32), Dense(256)),)).build(500)
    initialise(lm, 0)
    for name, weight in named_weights(lm):
        std = weight.detach().std().item()
        if weight.init_std is None:
            assert std == 0 and weight.min() == weight.constant, name
        else:
            assert math.isclose(std, weight.init_std, rel_tol=0.02), name
    block = lm.get_submodule("layers.0")
    assert block.get_parameter("mixer.heads.w_q").init_std == 128**-0.5  # pyright: ignore
    assert block.get_parameter("ffn.w_down").init_std == (256 * 2) ** -0.5  # pyright: ignore


def test_a_parameter_without_a_role_is_refused_by_name() -> None:
    part = nn.Module()
    part.register_parameter("stray", nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match="stray has no role"):
        initialise(part, 0)


def test_a_model_is_filled_by_parts_as_at_once() -> None:
    """In any order, some of it never, and of some only what is kept."""
    want = filled(3)
    with unfilled():
        lm = model()
    assert all(weight.is_meta for weight in lm.parameters())
    weights = dict(named_weights(lm))
    same, first = dict(weights), next(iter(weights))

    def kept(name: str, whole: torch.Tensor) -> torch.Tensor:
        return whole[1:3].clone() if name == first else whole

    filling = Filling(lm, 3, torch.device("cpu"), kept)
    layers = {*lm.layers[0].parameters()}
    filling.fill({*lm.layers[1].parameters()})
    assert all(weight.is_meta for weight in layers)
    filling.fill({weights[first]})
    filling.leave({lm.head.w_VD})
    filling.fill(layers)
    want[first], want["head.w_VD"] = want[first][1:3], want["head.w_VD"][:0]
    del want["head.norm.w_D"]
    for name, values in want.items():
        assert torch.equal(weights[name], values), name
        assert weights[name] is same[name] and isinstance(weights[name], Weight)
        assert weights[name].role and weights[name].requires_grad
    assert lm.head.norm.w_D.is_meta
