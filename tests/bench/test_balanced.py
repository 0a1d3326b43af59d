"""Forced-balanced routing: even, within the budget, and with the learned router still at work."""

import pytest
import torch

from moebius.bench.balanced import Balanced, balanced_twin, rounds
from moebius.config import from_json, to_json
from moebius.model.block.scmoe import ScMoE
from moebius.model.ffn.balance import Layout
from moebius.model.ffn.moe import MoE, MoELayer
from moebius.recipes import recipe
from moebius.train.run import Run

from ..running import RECIPES

CPU = torch.device("cpu")
LAYOUTS = [
    Layout(8, 0, 3, 3.0),
    Layout(64, 32, 6, 4.0),
    Layout(40, 20, 4, 3.0),
    Layout(8, 4, 3, 1.3),
    Layout(5, 1, 3, 2.5),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_output_is_used_equally_and_the_budget_is_kept(layout: Layout) -> None:
    num_tokens = 480
    index_NS = rounds(num_tokens, layout, CPU)
    assert index_NS.shape == (num_tokens, layout.top_k)
    count_E = torch.bincount(index_NS.flatten(), minlength=layout.num_outputs)
    assert len(count_E) == layout.num_outputs
    for part in (count_E[: layout.num_ffn], count_E[layout.num_ffn :]):
        assert not len(part) or int(part.max() - part.min()) <= 1
    assert int(count_E[: layout.num_ffn].sum()) == round(layout.ffn_per_token * num_tokens)
    twice = index_NS.sort(-1).values.diff(dim=-1) == 0
    assert not twice.any(), "a token got an output twice"


def test_a_run_keeps_all_but_its_routing_and_its_router_learns() -> None:
    run = recipe(f"{RECIPES}:tiny")
    forced = balanced_twin(run)
    assert from_json(Run, to_json(forced)) == forced
    (layer,), (before,) = forced.model.layers, run.model.layers
    assert isinstance(layer, ScMoE) and isinstance(layer.moe, MoE)
    assert isinstance(before, ScMoE) and isinstance(before.moe, MoE)
    assert layer.moe.router == Balanced(before.moe.router, 8, 4, 2.0)
    assert (layer.mixer, layer.dense, forced.optim) == (before.mixer, before.dense, run.optim)
    model = forced.model.build(run.vocab)
    (moe,) = [module for module in model.modules() if isinstance(module, MoELayer)]
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    x_ND = torch.randn(24, 32)
    route = moe.router(x_ND, moe.bias_E())
    assert torch.equal(route.index_NS, rounds(24, moe.layout, CPU))
    route.weight_NS.sum().backward()
    assert sum(float(x.grad.norm()) for x in moe.router.parameters() if x.grad is not None) > 0
