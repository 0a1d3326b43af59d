"""Layouts of data and expert parallelism against one process: losses, gradients, norm, state.

In fp64 nothing but the order of sums differs, so any factor (expert gradients doubled, losses
averaged twice, a balance loss of the local batch alone) shows at once; in fp32 one step.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from .ranks import launch

TWO: list[dict[str, Any]] = [{}, {"ep": 2}, {"dp_replicate": 2}, {"ep": 2, "reshard": False}]
FOUR: list[dict[str, Any]] = [
    {"ep": 2},
    {"ep": 4},
    {"dp_replicate": 2, "ep": 2},
    {"dp_replicate": 4},
]


def check(found: list[dict[str, Any]], bound: float) -> None:
    for case in found:
        assert case["names"], case
        assert case["loss"] < bound and case["norm"] < bound and case["sums"] < bound, case
        assert case["ratios"] < bound and case["worst"][0] < bound, case
        assert case["num_counts"] > 0 and case["counts"] and case["buffers"], case


@pytest.mark.parametrize(("ranks", "layouts"), [(2, TWO), (4, FOUR)])
def test_training_equals_one_process_in_fp64(
    ranks: int, layouts: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Ten steps of a ScMoE under a budget; recycled tokens, two routers and tied weights.

    Each layout also goes on from what it saved, as every layout of a worker does.
    """
    exact = ["precision=fp64"]
    cases = [["tiny", exact, 10, layouts], ["wild", exact, 3, layouts[:2]]]
    found = launch(ranks, "data_worker.py", tmp_path / "found.json", json_of(cases))
    assert len(found) == len(layouts) + 2
    check(found, 1e-10)


def test_one_step_in_fp32(tmp_path: Path) -> None:
    """Newton-Schulz in fp32 as well: in bf16 the last bit of a gradient moves an update by 1e-4."""
    exact = ["precision=fp32", "optim.roles.matrix.rule.compute=fp32"]
    cases = [["tiny", exact, 1, [{"ep": 2}]], ["pattern", exact, 1, [{}]]]
    found = launch(2, "data_worker.py", tmp_path / "found.json", json_of(cases))
    check(found, 1e-5)


def test_averages_of_schedule_free(tmp_path: Path) -> None:
    cases = [["averaged", ["precision=fp64"], 4, [{}, {"ep": 2}]]]
    check(launch(2, "data_worker.py", tmp_path / "found.json", json_of(cases)), 1e-10)


def test_soap_turns_the_bases_of_experts_where_they_lie(tmp_path: Path) -> None:
    """Five steps: one that measures, then updates in bases that turn twice. Only sides of 16 have
    bases, and many tokens: where a gradient lacks full rank, rounding alone decides on a basis."""
    cases = [["soaped", ["precision=fp64", "batch=32"], 5, [{}, {"ep": 2}, {"tp": 2}]]]
    check(launch(2, "data_worker.py", tmp_path / "found.json", json_of(cases)), 1e-10)


def product(backward: str) -> str:
    return json.dumps({"format": "mxfp8", "backward": backward})


def test_products_in_low_precision(tmp_path: Path) -> None:
    """Ranks take scales of gradients of weights from their own tokens, as micro-batches do; experts
    take them from the tokens of all ranks, so there only other products are compared."""
    exact = ["precision=fp64", "model.layers.0.moe.balance=[]", "micro_batch=2"]
    four = 'products={"expert": {"format": "nvfp4"}, "matrix": {"format": "nvfp4"}}'
    eight = f'products={{"expert": {product("input")}, "matrix": {product("both")}}}'
    cases = [
        ["tiny", [*exact, four], 2, [{}, {"dp_replicate": 2}]],
        ["tiny", [*exact, eight], 2, [{"ep": 2}]],
        ["tower", ["precision=fp64", "micro_batch=1", four], 2, [{"pp": 2}]],
    ]
    found = launch(2, "data_worker.py", tmp_path / "found.json", json_of(cases))
    assert len(found) == 4
    check(found, 1e-10)


def test_heads_are_clipped_on_ranks_as_on_one_process(tmp_path: Path) -> None:
    """QK-Clip at so low a threshold that it scales heads in every step; keys take their half."""
    exact = ["precision=fp64", 'qk_clip={"threshold": 1e-4}']
    own = ["model.layers.0.mixer.kv_heads=4", "model.layers.0.mixer.bias=true"]
    cases = [
        ["tiny", exact, 4, [{"ep": 2}, {"dp_replicate": 2}]],
        ["pattern", [*exact, *own], 4, [{}, {"reshard": False}]],
    ]
    found = launch(2, "data_worker.py", tmp_path / "found.json", json_of(cases))
    check(found, 1e-10)
    assert all(case["clipped_heads"][0] == case["clipped_heads"][1] > 8 for case in found)


def test_layers_are_gathered_in_bf16_where_they_are_multiplied_in_it(tmp_path: Path) -> None:
    for name, found in launch(2, "gather_worker.py", tmp_path / "found.json").items():
        half = name == "bf16"
        for role, dtypes in found["dtypes"].items():
            want = "bfloat16" if half and role in ("matrix", "expert") else "float32"
            assert dtypes == [f"torch.{want}"], (name, role)
        # Gradients that a kernel makes in fp32 are rounded to bf16 on their way to the sum.
        assert found["loss"] < (1e-4 if half else 1e-6), name
        assert found["gradients"] < (1e-2 if half else 1e-5), name


@pytest.mark.slow
def test_no_rank_ever_holds_the_whole_model(tmp_path: Path) -> None:
    """Four ranks of 444M parameters: what one takes to begin is what it keeps, and a layer; to go
    on, the moments that it reads as well. The checkpoint is four times what a rank keeps."""
    found = launch(4, "memory_worker.py", tmp_path / "found.json", tmp_path / "checkpoints")
    assert found["whole"] > 1.7e9
    for begun, resumed, held in found["ranks"]:
        assert held < 0.6 * found["whole"]
        assert begun < held + 0.3 * found["whole"], (begun, held, found["whole"])
        assert resumed < 1.6 * held + 0.1 * found["whole"], (resumed, held, found["whole"])


# Each recipe with the degrees that its parts have a plan for.
ALL: list[dict[str, Any]] = [{}, {"ep": 2}, {"tp": 2}, {"cp": 2}]
RECIPES: list[tuple[str, list[dict[str, Any]], str]] = [
    ("quickstart", ALL, "1f1b"),
    ("hunyuan-nano, wider", ALL, "1f1b"),
    ("llama3-nano", [{}, {"tp": 2}, {"cp": 2}], "zbv"),
    ("kimi-linear-nano", ALL, "interleaved"),
]


# The degrees of a node of eight: of each pair one layout, and some of three.
EIGHT: list[dict[str, Any]] = [
    {"ep": 4},
    {"dp_replicate": 2, "ep": 2, "tp": 2},
    {"pp": 2, "ep": 2, "tp": 2},
    {"pp": 2, "schedule": "interleaved", "dp_replicate": 2, "ep": 2},
    {"pp": 4, "ep": 2},
]


@pytest.mark.slow
def test_eight_ranks(tmp_path: Path) -> None:
    exact = ["precision=fp64", "batch=8", "micro_batch=1"]
    cases = [["tower", exact, 2, EIGHT], ["pattern", exact, 2, [{"cp": 4, "tp": 2}]]]
    found = launch(8, "data_worker.py", tmp_path / "found.json", json_of(cases))
    assert len(found) == len(EIGHT) + 1
    check(found, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "layouts", "schedule"), RECIPES)
def test_recipes_on_two_ranks(
    recipe: str, layouts: list[dict[str, Any]], schedule: str, tmp_path: Path
) -> None:
    """Ten steps of each, with a small vocabulary and short sequences."""
    small = ["precision=fp64", "vocab=512", "batch=2", "sequence_length=64"]
    pipe = {"pp": 2, "schedule": schedule}
    cases = [[recipe, small, 10, layouts], [recipe, [*small, "micro_batch=1"], 10, [pipe]]]
    found = launch(2, "data_worker.py", tmp_path / "found.json", json_of(cases))
    assert len(found) == len(layouts) + 1
    for case in found:
        case["num_counts"] = case["num_counts"] or recipe == "llama3-nano"
    check(found, 1e-10)


def json_of(cases: list[list[Any]]) -> str:
    return json.dumps(cases)
