"""LongCat-Flash's layer against its wiring, written out; what may depend on what inside it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.model.block.scmoe import ScMoE
from moebius.model.context import Context
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE
from moebius.model.mixers.mla import MLA
from moebius.model.part import Site
from moebius.model.weight import initialise

from . import formulas
from .inputs import context, noise

WIDTH = 24
MOE = MoE(experts=4, expert_width=8, top_k=3, zero_experts=2, ffn_per_token=2.0, scaling=6.0)
LAYER = ScMoE(
    MLA(heads=3, q_rank=10, kv_rank=6, nope_width=5, rope_width=4, v_width=7), Dense(20), MOE
)


def built(config: ScMoE = LAYER) -> Any:
    """The layer with noisy norms, so that mistaking one for another shows."""
    block = config.build(Site(WIDTH, 5, 0, 1e-5))
    initialise(block, 0)
    with torch.no_grad():
        for i, weight in enumerate(block.parameters()):
            if weight.ndim == 1:
                weight += 0.3 * noise(*weight.shape, seed=i, dtype=weight.dtype)
    return block.double().eval()


def moe_formula(moe: Any, h_TD: Tensor) -> Tensor:
    """gamma * sum of g_i E_i(h): softmax over all outputs, no renormalisation, E_i = h beyond N."""
    out: list[Tensor] = []
    for h_D in h_TD:
        score_E = (moe.router.w_ED @ h_D).softmax(0)
        y_D = torch.zeros_like(h_D)
        for expert in score_E.topk(3).indices.tolist():
            up, down = (
                w[expert] if expert < 4 else None for w in (moe.w_gate_up_E2FD, moe.w_down_EDF)
            )
            chosen_D = h_D if up is None or down is None else formulas.swiglu(h_D, up, down)
            y_D = y_D + 6.0 * score_E[expert] * chosen_D
        out.append(y_D)
    return torch.stack(out)


@torch.no_grad()
def test_the_layer_is_its_formula() -> None:
    block, x_BTD = built(), 2 * noise(1, 9, WIDTH)
    y_BTD = block(x_BTD, context((9,)), None, {}).x_BTD

    def norm(part: Any, x: Tensor) -> Tensor:
        return formulas.rms(x, part.w_D, 1e-5)

    x = x_BTD[0]
    a0 = x + formulas.mla(block.mixer_0, norm(block.mixer_norm_0, x))
    h0 = norm(block.ffn_norm_0, a0)
    moe = moe_formula(block.moe, h0)
    a1 = a0 + formulas.swiglu(h0, block.dense_0.w_gate_up, block.dense_0.w_down)
    a2 = a1 + formulas.mla(block.mixer_1, norm(block.mixer_norm_1, a1))
    h1 = norm(block.ffn_norm_1, a2)
    y = a2 + formulas.swiglu(h1, block.dense_1.w_gate_up, block.dense_1.w_down) + moe
    torch.testing.assert_close(y_BTD[0], y, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_the_moe_is_not_seen_inside_its_layer() -> None:
    """Another MoE output moves the layer's output by exactly the difference, and nothing before."""
    block, x_BTD, ctx = built(), noise(1, 9, WIDTH), context((9,))
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> None:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[f"{name} input"], seen[f"{name} output"] = args[0], output[0]

        block.get_submodule(name).register_forward_hook(hook)

    inside = ("mixer_0", "dense_0", "mixer_1", "dense_1")
    for name in inside:
        watch(name)
    before = block(x_BTD, ctx, None, {}).x_BTD
    first, moe_before = dict(seen), block.moe(seen["dense_0 input"], ctx)[0]
    block.moe.w_down_EDF *= 50
    after = block(x_BTD, ctx, None, {}).x_BTD
    moe_after = block.moe(seen["dense_0 input"], ctx)[0]
    assert len(first) == 2 * len(inside)
    for name, tensor in first.items():
        assert torch.equal(tensor, seen[name]), f"{name} depends on the MoE of its own layer"
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after - before, moe_after - moe_before)


@torch.no_grad()
def test_the_next_layer_sees_the_moe() -> None:
    first, second, ctx = built(), built(), context((9,))
    x_BTD = noise(1, 9, WIDTH)
    before = second(first(x_BTD, ctx, None, {}).x_BTD, ctx, None, {}).x_BTD
    first.moe.w_down_EDF *= 2
    after = second(first(x_BTD, ctx, None, {}).x_BTD, ctx, None, {}).x_BTD
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("dense", [Dense(20), MOE], ids=["dense", "moe"])
def test_stats_come_in_the_order_of_the_routers(dense: Dense | MoE) -> None:
    """Also where a router sits in the dense FFN's place: nothing a router did is lost."""
    block = built(ScMoE(LAYER.mixer, dense, MOE))
    routers = [moe for moe in block.modules() if hasattr(moe, "router")]
    with torch.no_grad():
        # Each router prefers zero experts less than the one before.
        for i, moe in enumerate(routers):
            moe.router.w_ED.zero_()
            moe.router.w_ED[i] = 1.0
        stats = block(noise(2, 9, WIDTH).abs(), context((9,), (9,)), None, {}).stats
    assert len(stats) == len(routers) == (1 if isinstance(dense, Dense) else 3)
    assert all(int(each.count_E.sum()) == 3 * 18 for each in stats)


def test_decode_states_are_two_a_layer() -> None:
    block, tokens_BT = built(), torch.zeros(1, 3, dtype=torch.int64)
    states = tuple(
        mixer.init_state(1, torch.float64, torch.device("cpu")) for mixer in block.mixers()
    )
    ctx = Context.continuing(tokens_BT, 0)
    out = block(noise(1, 3, WIDTH), ctx, states, {})
    assert out.states is not None and [state.length for state in out.states] == [3, 3]
