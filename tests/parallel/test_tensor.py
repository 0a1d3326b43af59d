"""Tensor parallelism against one process, in fp64: nothing but the order of sums may differ.

All ranks of a tensor group compute the loss of the same tokens, so every factor that is wrong in
one place (a bias added by each rank, a weight of all ranks counted once for each, a loss divided by
their number) is a factor of 2 or 4 here.
"""

import json
from typing import Any

import pytest

from .ranks import launch

BOUND = 1e-10
TWO = [[name, 10, [{"tp": 2}]] for name in ("llama", "mixed", "tiny", "sparse")]
FOUR = [
    ["llama", 2, [{"tp": 4}, {"tp": 2}]],
    ["mixed", 1, [{"tp": 2, "ep": 2}]],
    ["tiny", 1, [{"tp": 2, "dp_replicate": 2, "reshard": False}]],
    ["sparse", 2, [{"tp": 4}, {"cp": 2, "tp": 2}, {"cp": 4}]],
]
CASES = {2: TWO, 4: FOUR}


@pytest.fixture(scope="module", params=[4, pytest.param(2, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What so many ranks found; one launch visits all layouts."""
    folder, cases = tmp_path_factory.mktemp("tensor"), CASES[request.param]
    out = folder / "found.json"
    return launch(request.param, "tensor_worker.py", out, folder, json.dumps(cases))


def test_gradients_and_states_equal_those_of_one_process(found: Any) -> None:
    """Every gradient of the first step, and weights, moments and balance after the last."""
    assert found["layouts"]
    for case in found["layouts"]:
        assert case["names"] and case["worst"][0] < BOUND and case["ratios"] < BOUND, case
        assert case["counts"] and case["buffers"], case
        assert (case["num_counts"] > 0) == (case["recipe"] in ("mixed", "tiny")), case


def test_losses_are_neither_halved_nor_doubled(found: Any) -> None:
    """torchtitan #3280 (its loss halves under TP with CP); those of MTP and z-losses as well."""
    for case in found["layouts"]:
        assert case["loss"] < BOUND and case["sums"] < BOUND, case
    assert max(found["loss"].values()) < 1e-12, found["loss"]


def test_weights_of_all_ranks_count_once_in_the_global_norm(found: Any) -> None:
    for case in found["layouts"]:
        assert case["norm"] < BOUND, case


def test_ranks_of_a_tensor_group_share_the_tokens_of_experts(found: Any) -> None:
    rows = found["rows"]
    assert rows["own"] == 3 and rows["values"] and rows["gradients"], rows
    assert rows["computed"] == rows["tokens"] > 0


def test_loads_are_one_where_ranks_of_a_tensor_group_disagree(found: Any) -> None:
    """Router biases follow them on each rank: replicas that drift (a rounding apart) would stay."""
    ranks = len(found["loads"])
    total = sum(1 + rank for rank in range(0, ranks, 2))
    assert found["loads"] == [[total] * 3] * ranks


def test_a_checkpoint_of_ranks_goes_on_on_one_process(found: Any) -> None:
    """And ranks take over what one process saved, to the bit."""
    assert found["resumed"]["step"] == 2
    moved, want = found["resumed"]["losses"]
    assert moved == pytest.approx(want, rel=BOUND)
    assert found["resumed"]["again"] and all(found["resumed"]["again"])


def test_what_has_no_plan_is_refused_by_name(found: Any) -> None:
    assert found["refused"] == [
        "layer 1: Alone has no plan for parallel.tp; use 1",
        "layer 1: parallel.tp=2 must divide its 3 heads",
        "layer 1: parallel.tp=2 must divide its 4 heads and 1 kv_heads",
        "layers.1.ffn.w_gate_up of shape [94, 32] cannot be cut into 4 equal parts along dim 0; "
        "choose degrees of parallel that divide it",
        "embed.w_VD of shape [301, 32] cannot be cut into 2 equal parts along dim 0; "
        "choose degrees of parallel that divide it",
    ]
