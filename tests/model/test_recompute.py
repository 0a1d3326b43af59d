"""Activation checkpointing changes no bit, routes once, counts once and is not watched twice."""

import dataclasses
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moebius.model.block.prenorm import PreNorm
from moebius.model.block.scmoe import ScMoE
from moebius.model.ends.hidden_z import HiddenZ
from moebius.model.ends.mtp import MTP
from moebius.model.ffn.balance.budget import Budget
from moebius.model.ffn.balance.group import GroupLoss
from moebius.model.ffn.balance.router_z import RouterZ
from moebius.model.ffn.capacity import Capacity
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE, MoELayer
from moebius.model.ffn.routers.sigmoid import Sigmoid
from moebius.model.lm import LM, Loss, ModelConfig
from moebius.model.mixers.cla import shared
from moebius.model.mixers.gqa import GQA
from moebius.model.mixers.mla import MLA
from moebius.model.weight import initialise, named_weights
from moebius.monitor.tap import Observer, observing
from moebius.ops.topk import OPERATORS

from .inputs import context, tokens

VOCAB, WIDTH = 30, 16
MOE = MoE(
    experts=4,
    expert_width=8,
    top_k=3,
    zero_experts=2,
    ffn_per_token=2.0,
    shared_experts=1,
    balance=(Budget(), GroupLoss(), RouterZ()),
)
VARIANTS = {
    "plain": MOE,
    "recycle": dataclasses.replace(MOE, capacity=Capacity(0.7, "recycle")),
    "groups": dataclasses.replace(MOE, router=Sigmoid(num_groups=3, top_groups=2)),
}
# How often a router of each variant asks for the best k.
TOP_K_CALLS = {"plain": 1, "recycle": 1, "groups": 3}
LAYERS = 3


class _Watch(Observer):
    def __init__(self) -> None:
        self.seen: list[str] = []
        self.gradients: list[tuple[str, Tensor]] = []

    def see(self, name: str, x: Tensor) -> None:
        self.seen.append(name)

    def see_gradient(self, name: str, grad: Tensor, index: Tensor) -> None:
        self.gradients.append((name, grad))


class _Operations(TorchDispatchMode):
    """How often each operation ran, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass(frozen=True)
class _Pass:
    loss: Loss
    grads: dict[str, Tensor]
    operations: Counter[str]
    watch: _Watch


def model(moe: MoE, ties: bool) -> LM:
    mixer = MLA(heads=2, q_rank=8, kv_rank=6, nope_width=4, rope_width=4, v_width=6)
    layers = (ScMoE(mixer, Dense(20), moe), ScMoE(mixer, Dense(20), moe), PreNorm(mixer, moe))
    assert len(layers) == LAYERS
    ends = (MTP(GQA(2, 1, 4), Dense(12)), HiddenZ(0.1))
    lm = ModelConfig(WIDTH, layers, ends).build(VOCAB)
    initialise(lm, 0)
    if ties:
        for router in (module for module in lm.modules() if isinstance(module, MoELayer)):
            for weight in router.router.parameters():
                # Expert rows that differ in the last bit only.
                weight.data = weight.data[:1] * (1 + 1e-7 * torch.arange(6.0)[:, None])
    return lm


def selections(operations: Counter[str]) -> int:
    """How often something was selected, by any backend."""
    return sum(operations[str(operator)] for operator in OPERATORS)


def run(lm: LM, recompute: bool, dtype: torch.dtype = torch.float32) -> _Pass:
    tokens_BT, targets_BT = tokens(3, 24, VOCAB)
    ctx = context((24,), (10, 14), (5, 5, 14), padded=2, step=7)
    for weight in lm.parameters():
        weight.grad = None
    watch = _Watch()
    with _Operations() as operations, observing(watch):
        loss = lm.loss(tokens_BT, targets_BT, ctx, dtype=dtype, recompute=recompute)
        (loss.total / ctx.num_targets).backward()
    grads = {name: w.grad.clone() for name, w in named_weights(lm) if w.grad is not None}
    return _Pass(loss, grads, operations.count, watch)


@pytest.mark.parametrize(
    ("variant", "ties", "dtype"),
    [
        *((variant, ties, torch.float32) for variant in VARIANTS for ties in (False, True)),
        ("plain", True, torch.bfloat16),
        ("plain", True, torch.float64),
    ],
    ids=str,
)
def test_gradients_are_equal_to_the_last_bit(variant: str, ties: bool, dtype: torch.dtype) -> None:
    lm = model(VARIANTS[variant], ties)
    plain, again = run(lm, False, dtype), run(lm, True, dtype)
    assert torch.equal(plain.loss.total, again.loss.total)
    assert plain.grads.keys() == again.grads.keys() == dict(named_weights(lm)).keys()
    for name, grad in plain.grads.items():
        assert torch.equal(grad, again.grads[name]), name
    for name, value in plain.loss.sums.items():
        assert torch.equal(value, again.loss.sums[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_routing_is_computed_once_and_the_rest_twice(variant: str) -> None:
    lm = model(VARIANTS[variant], ties=True)
    plain, again = run(lm, False), run(lm, True)
    calls = TOP_K_CALLS[variant] * LAYERS
    assert selections(plain.operations) == selections(again.operations) == calls
    softmax = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    mixers = 2 * (LAYERS - 1) + 1
    assert plain.operations[softmax] == mixers + 1, "the mixers, and that of MTP"
    assert again.operations[softmax] == 2 * mixers + 1
    assert again.operations["aten.mm.default"] > plain.operations["aten.mm.default"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_loads_are_counted_once(variant: str) -> None:
    lm = model(VARIANTS[variant], ties=False)
    plain, again = run(lm, False).loss.stats, run(lm, True).loss.stats
    assert [len(layer) for layer in again] == LAYERS * [1]
    for (before,), (after,) in zip(plain, again, strict=True):
        assert int(after.count_E.sum()) == MOE.top_k * int(after.num_tokens) == 3 * 66
        for field in dataclasses.fields(before):
            assert torch.equal(getattr(before, field.name), getattr(after, field.name))


def test_taps_are_silent_while_recomputing() -> None:
    lm = model(MOE, ties=False)
    plain, again = run(lm, False).watch, run(lm, True).watch
    assert plain.seen == again.seen
    assert Counter(again.seen) == {
        f"layers/{i}/{name}": 1 for i in range(LAYERS) for name in ("hidden", "ffn_per_token")
    }
    names = [name for name, _ in again.gradients]
    assert sorted(names) == [f"layers/{i}/score" for i in range(LAYERS)]
    for (name, grad), (other, same) in zip(plain.gradients, again.gradients, strict=True):
        assert name == other and torch.equal(grad, same)


def test_without_gradients_nothing_is_recomputed() -> None:
    lm, (tokens_BT, _) = model(MOE, ties=False), tokens(1, 24, VOCAB)
    ctx = context((24,))
    with torch.no_grad(), _Operations() as operations:
        lm(tokens_BT, ctx, recompute=True)
    assert selections(operations.count) == LAYERS


# --- units of layers that share keys and values ---------------------------------------------------


def sharing(ffn: MoE | Dense, *factors: int) -> LM:
    """Groups of layers of so many each, over GQA and MLA in turn."""
    kinds = (GQA(4, 2, 4), MLA(2, q_rank=8, kv_rank=6, nope_width=4, rope_width=4, v_width=6))
    groups = [shared(kinds[i % 2], factor) for i, factor in enumerate(factors)]
    layers = tuple(PreNorm(mixer, ffn) for group in groups for mixer in group)
    lm = ModelConfig(WIDTH, layers).build(VOCAB)
    initialise(lm, 0)
    return lm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factors", [(2, 2), (4,), (1, 3)], ids=str)
def test_units_give_equal_gradients(factors: tuple[int, ...], dtype: torch.dtype) -> None:
    lm = sharing(VARIANTS["recycle"], *factors)
    plain, again = run(lm, False, dtype), run(lm, True, dtype)
    assert torch.equal(plain.loss.total, again.loss.total)
    assert plain.grads.keys() == again.grads.keys() == dict(named_weights(lm)).keys()
    for name, grad in plain.grads.items():
        assert torch.equal(grad, again.grads[name]), name
    assert plain.watch.seen == again.watch.seen
    assert selections(again.operations) == sum(factors)
    for (before,), (after,) in zip(plain.loss.stats, again.loss.stats, strict=True):
        assert torch.equal(before.count_E, after.count_E)


def kept(lm: LM, recompute: bool) -> tuple[int, list[str]]:
    """Bytes that a forward saves for the backward; and which lent tensors Python still holds."""
    saved: dict[int, int] = {}
    lent: list[tuple[str, weakref.ref[Tensor]]] = []

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def watch(block: Any, given: Any, out: Any) -> None:
        lent.extend((name, weakref.ref(x)) for name, x in out.lent.items())

    hooks = [block.register_forward_hook(watch) for block in lm.blocks()]
    tokens_BT, targets_BT = tokens(3, 24, VOCAB)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = lm.loss(tokens_BT, targets_BT, context(*3 * [(24,)]), recompute=recompute)
    alive = [name for name, ref in lent if ref() is not None]
    for hook in hooks:
        hook.remove()
    assert loss.total.requires_grad and lent
    return sum(saved.values()), alive


def test_recompute_keeps_the_input_of_each_unit_and_nothing_lent() -> None:
    """A longer unit keeps less: one residual stream a unit, whatever its layers lend each other."""
    stream = 3 * 24 * WIDTH * 4
    sizes = {}
    for factors in ((1, 1, 1, 1), (2, 2), (4,)):
        lm = sharing(Dense(20), *factors)
        whole, _ = kept(lm, False)
        sizes[factors], still_lent = kept(lm, True)
        assert not still_lent
        assert sizes[factors] < whole / 4
    assert sizes[1, 1, 1, 1] - sizes[2, 2] == 2 * stream
    assert sizes[2, 2] - sizes[(4,)] == stream
