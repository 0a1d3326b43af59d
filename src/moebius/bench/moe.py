"""`moebius bench moe`: one MoE layer against a dense SwiGLU of the same useful FLOPs.

Forward and backward of every backend, of a padded batched product, and of the whole layer with its
router, over shapes and loads. Masters are fp32 and cast in the graph, as in training, for the dense
SwiGLU too. Letters: N tokens, D width, F hidden width of an expert, E experts, S selected.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebius.bench.compare import Candidate, compare, numbers, ratios, settings
from moebius.bench.padded import experts_padded
from moebius.bench.timing import machine
from moebius.model.context import Context
from moebius.model.ffn.moe import MoE, MoELayer
from moebius.model.part import Site
from moebius.model.weight import initialise
from moebius.ops.experts import BACKENDS, ExpertOp, choose
from moebius.ops.linear import linear
from moebius.ops.swiglu import swiglu

SHAPES = ("4096x256x128x64x6", "4096x256x192x40x4", "1024x256x128x64x6", "4096x512x512x8x2")
LOADS = ("uniform", "zipf")
DENSE, LAYER = "dense", "layer"


class Shape(NamedTuple):
    """Sizes of one case."""

    N: int
    D: int
    F: int
    E: int
    S: int

    @property
    def flops(self) -> float:
        """Useful FLOPs of forward and backward."""
        return 3.0 * 2.0 * self.N * self.S * 3 * self.D * self.F


def shape_of(text: str) -> Shape:
    """`NxDxFxExS`; ValueError where it is not."""
    shape = Shape(*numbers(text, 5, "NxDxFxExS"))
    if shape.S > shape.E:
        raise ValueError(f"{text!r} selects {shape.S} of {shape.E} experts")
    return shape


def loaded(shape: Shape, load: str, seed: int = 0) -> Tensor:
    """index_NS by random choice without repetition: every expert as likely, or as 1, 1/2, 1/3..."""
    if load not in LOADS:
        raise ValueError(f"load {load!r} is none of {', '.join(LOADS)}")
    generator = torch.Generator().manual_seed(seed)
    noise_NE = torch.rand(shape.N, shape.E, generator=generator).clamp_(min=1e-9)
    gumbel_NE = -(-noise_NE.log()).log()
    rank_E = torch.randperm(shape.E, generator=generator) + 1.0
    likely_E = -rank_E.log() if load == "zipf" else torch.zeros(shape.E)
    return (gumbel_NE + likely_E).topk(shape.S, dim=-1).indices


def bench_moe(
    shapes: Sequence[str] = SHAPES,
    loads: Sequence[str] = LOADS,
    *,
    device: str = "auto",
    precision: str = "bf16",
    threads: int | None = None,
    repeats: int = 10,
    matmul_flops: float | None = None,
) -> dict[str, Any]:
    """Time all shapes under all loads; a dict of machine facts and `rows`."""
    cases = [(shape_of(text), text, load) for text in shapes for load in loads]
    where, dtype = settings(device, precision, threads)
    rows: list[dict[str, Any]] = []
    names: list[str] = []
    for shape, text, load in cases:
        candidates = _candidates(shape, load, where, dtype)
        work = {"tokens": shape.N, "flops": shape.flops, "repeats": repeats}
        found = compare(f"{text} {load}", candidates, "naive", where, dtype, **work)
        names.append(choose(where, dtype, candidates["naive"].inputs[-1]))
        used = next(row for row in found if row["name"] == names[-1])
        layer = next(row for row in found if row["name"] == LAYER)
        layer["agrees"] = used["agrees"]
        ratios(found, DENSE, "over_dense")
        rows += found
    notes = ["cases are NxDxFxExS and the load; `layer` has its router and that router's own load"]
    return {
        **machine(where, dtype, matmul_flops),
        "in_use": {"experts": " and ".join(sorted({*names}))},
        "notes": notes,
        "rows": rows,
    }


def _candidates(
    shape: Shape, load: str, device: torch.device, dtype: torch.dtype
) -> dict[str, Candidate]:
    N, D, F, E, S = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, std: float) -> Tensor:
        return (torch.randn(*size, generator=generator) * std).to(device)

    index_NS = loaded(shape, load).to(device)
    weight_NS = (torch.rand(N, S, generator=generator) + 0.5).div(S).to(device)
    x_ND = normal(N, D, std=1.0).to(dtype)
    gate_up, down = normal(E, 2 * F, D, std=D**-0.5), normal(E, D, F, std=F**-0.5)
    inputs = (x_ND, weight_NS, gate_up, down)
    ops = {**BACKENDS, "padded": experts_padded}
    dense = (x_ND, normal(2 * S * F, D, std=D**-0.5), normal(D, S * F, std=(S * F) ** -0.5))
    layer = MoE(E, F, S).build(Site(D, 2, 0, 1e-5))
    initialise(layer, 0)
    return {
        DENSE: Candidate(_dense, dense, same=False),
        **{name: Candidate(partial(_experts, op, index_NS), inputs) for name, op in ops.items()},
        LAYER: Candidate(*_layer(layer.to(device), x_ND), same=False),
    }


def _dense(x_ND: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    return linear(swiglu(linear(x_ND, w_gate_up)), w_down)


def _experts(
    op: ExpertOp, index_NS: Tensor, x_ND: Tensor, weight_NS: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    return op(x_ND, index_NS, weight_NS, gate_up, down, None, None, swiglu)


def _layer(layer: torch.nn.Module, x_ND: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
    """The whole layer as a function of its input and its weights."""
    assert isinstance(layer, MoELayer)
    rows = x_ND.shape[0] // 512 if x_ND.shape[0] % 512 == 0 else 1
    tokens_BT = torch.zeros(rows, x_ND.shape[0] // rows, dtype=torch.int64, device=x_ND.device)
    ctx = Context.continuing(tokens_BT, 0)
    names, weights = zip(*layer.named_parameters(), strict=True)

    def compute(x_ND: Tensor, *weights: Tensor) -> Tensor:
        given = dict(zip(names, weights, strict=True))
        inputs = (x_ND.view(*tokens_BT.shape, -1), ctx)
        y_BTD, _ = torch.func.functional_call(layer, given, inputs)
        return y_BTD

    return compute, (x_ND, *weights)
