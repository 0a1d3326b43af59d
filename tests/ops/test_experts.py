"""The fast expert ops against a loop over experts: all routings, values and every gradient."""

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor

from moebius.ops.experts import BACKENDS, choose, experts, in_use
from moebius.ops.experts.naive import experts_naive
from moebius.ops.experts.sorted import filled
from moebius.ops.native import missing
from moebius.ops.swiglu import clamped_swiglu

from .compare import TOLERANCE, assert_same, noise

NUM_EXPERTS, NUM_ZERO = 5, 3
DROPPED = NUM_EXPERTS + NUM_ZERO
# name -> index_NS; indices of 5..7 are zero experts, 8 is a dropped assignment.
ROUTINGS = {
    "one_token": torch.tensor([[2, 4]]),
    "spread": torch.tensor([[0, 1], [2, 3], [4, 0], [1, 4], [3, 2], [0, 3], [2, 1]]),
    "empty_experts": torch.tensor([[3, 1], [1, 3], [3, 1]]),
    "all_on_one": torch.tensor([[0], [0], [0], [0]]),
    "last_expert": torch.tensor([[4], [4]]),
    "zero_experts": torch.tensor([[5, 0, 7], [6, 5, 7], [1, 6, 4], [7, 2, 0]]),
    "dropped": torch.tensor([[8, 0, 1], [2, 8, 8], [8, 8, 8], [4, 3, 8]]),
    "nothing_routed": torch.tensor([[5, 6], [8, 7]]),
}
# grouped_mm takes bf16 and fp32, the native kernel bf16.
PAIRS = [
    (name, dtype)
    for name, dtypes in {
        "segments": (torch.float64, torch.float32, torch.bfloat16),
        "grouped": (torch.float32, torch.bfloat16),
        "native": (torch.bfloat16,) if missing() is None else (),
    }.items()
    for dtype in dtypes
]


def inputs_of(
    index_NS: Tensor, width: int, hidden: int, dtype: torch.dtype, master: torch.dtype
) -> dict[str, Tensor]:
    tokens = len(index_NS)
    return {
        "x": noise(tokens, width, seed=1, dtype=dtype),
        "weight": noise(*index_NS.shape, seed=2, dtype=torch.promote_types(dtype, torch.float32)),
        "gate_up": noise(NUM_EXPERTS, 2 * hidden, width, seed=3, dtype=master) * width**-0.5,
        "down": noise(NUM_EXPERTS, width, hidden, seed=4, dtype=master) * hidden**-0.5,
    }


def function(
    op: Callable[..., Tensor], index_NS: Tensor
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    return lambda x: op(x["x"], index_NS, x["weight"], x["gate_up"], x["down"])


def with_biases(
    op: Callable[..., Tensor], index_NS: Tensor, *activation: Callable[[Tensor], Tensor]
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    names = ("weight", "gate_up", "down", "b_gate_up", "b_down")
    return lambda x: op(x["x"], index_NS, *(x[name] for name in names), *activation)


@pytest.mark.parametrize(("backend", "dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_fast_experts_equal_naive(routing: str, backend: str, dtype: torch.dtype) -> None:
    index_NS = ROUTINGS[routing]
    width, hidden = (64, 32) if backend == "native" else (16, 24)
    master = torch.promote_types(dtype, torch.float32)
    inputs = inputs_of(index_NS, width, hidden, dtype, master)
    fast, naive = function(BACKENDS[backend], index_NS), function(experts_naive, index_NS)
    assert_same(fast, naive, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize(("width", "hidden"), [(1, 1), (3, 5), (7, 2), (33, 17)])
def test_segments_take_any_width(width: int, hidden: int) -> None:
    index_NS = ROUTINGS["dropped"]
    inputs = inputs_of(index_NS, width, hidden, torch.float64, torch.float64)
    fast, naive = function(BACKENDS["segments"], index_NS), function(experts_naive, index_NS)
    assert_same(fast, naive, inputs, TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_segments_equal_naive_on_many_tokens(seed: int, dtype: torch.dtype) -> None:
    """In bf16 segments are filled up, so that the biases of empty rows must not show."""
    index_NS = noise(200, DROPPED + 1, seed=seed).topk(4).indices
    inputs = inputs_of(index_NS, 8, 8, dtype, torch.promote_types(dtype, torch.float32))
    inputs["b_gate_up"] = noise(NUM_EXPERTS, 16, seed=5, dtype=inputs["gate_up"].dtype)
    inputs["b_down"] = noise(NUM_EXPERTS, 8, seed=6, dtype=inputs["gate_up"].dtype)
    fast, naive = with_biases(BACKENDS["segments"], index_NS), with_biases(experts_naive, index_NS)
    assert_same(fast, naive, inputs, TOLERANCE[dtype])


def test_filled_segments_have_few_lengths() -> None:
    lengths = [filled(count) for count in range(4097)]
    assert all(count <= room <= 1.125 * count for count, room in enumerate(lengths))
    assert len(set(lengths)) <= 8 * 12
    assert lengths[:17] == list(range(17))


@pytest.mark.parametrize(("backend", "dtype"), [p for p in PAIRS if p[0] != "native"], ids=str)
def test_biases_and_clamped_swiglu_equal_naive(backend: str, dtype: torch.dtype) -> None:
    index_NS = ROUTINGS["zero_experts"]
    inputs = inputs_of(index_NS, 16, 24, dtype, torch.promote_types(dtype, torch.float32))
    inputs["b_gate_up"] = noise(NUM_EXPERTS, 48, seed=5, dtype=inputs["gate_up"].dtype)
    inputs["b_down"] = noise(NUM_EXPERTS, 16, seed=6, dtype=inputs["gate_up"].dtype)
    clamped = partial(clamped_swiglu, alpha=1.702, limit=0.7)
    fast = with_biases(BACKENDS[backend], index_NS, clamped)
    naive = with_biases(experts_naive, index_NS, clamped)
    assert_same(fast, naive, inputs, TOLERANCE[dtype])


def test_naive_is_the_formula() -> None:
    """One token, two experts, written out."""
    x = inputs_of(torch.tensor([[1, 3]]), 4, 6, torch.float64, torch.float64)
    want = torch.zeros(4, dtype=torch.float64)
    for slot, expert in enumerate((1, 3)):
        gate, up = x["gate_up"][expert][:6] @ x["x"][0], x["gate_up"][expert][6:] @ x["x"][0]
        hidden = gate / (1 + (-gate).exp()) * up
        want += x["weight"][0, slot] * (x["down"][expert] @ hidden)
    got = experts_naive(x["x"], torch.tensor([[1, 3]]), x["weight"], x["gate_up"], x["down"])
    torch.testing.assert_close(got[0], want)


def test_dropped_assignments_and_zero_experts_add_nothing() -> None:
    index_NS = ROUTINGS["nothing_routed"]
    x = inputs_of(index_NS, 16, 24, torch.float32, torch.float32)
    y_ND = experts(x["x"], index_NS, x["weight"], x["gate_up"], x["down"])
    assert torch.equal(y_ND, torch.zeros(2, 16))


def test_the_choice_is_a_backend() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    on_cpu = "native" if missing() is None else "segments"
    fits, wide = torch.empty(2, 64, 32), torch.empty(2, 64, 24)
    assert choose(cpu, torch.bfloat16) == choose(cpu, torch.bfloat16, fits) == on_cpu
    assert choose(cpu, torch.float32, fits) == choose(cuda, torch.float32, fits) == "segments"
    assert choose(cuda, torch.bfloat16, fits) == choose(cuda, torch.bfloat16, wide) == "grouped"
    assert in_use(cpu, torch.bfloat16, fits).startswith(on_cpu)
    assert in_use(cpu, torch.float32, fits) == "segments"


def test_experts_that_the_kernel_does_not_take_say_why() -> None:
    kind = (torch.device("cpu"), torch.bfloat16)
    fits, wide = torch.empty(2, 64, 32), torch.empty(2, 64, 24)
    assert choose(*kind, wide) == choose(*kind, fits, True) == "segments"
    assert in_use(*kind, wide) == "segments (widths 64 and 24 are not multiples of 32)"
    assert in_use(*kind, fits, True) == "segments (experts have biases)"
    activation = partial(clamped_swiglu, alpha=1.702, limit=0.7)
    assert in_use(*kind, fits, False, activation) == "segments (the activation is not SwiGLU)"
