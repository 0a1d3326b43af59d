"""Checks of what turns x_BTD into y_BTD: mixers, feed-forwards and blocks, over whole sequences.

A check takes a config and raises AssertionError with what is wrong. Values are compared in fp64, in
evaluation mode, since in training a capacity may be random.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from moebius.model.block import Block
from moebius.model.context import Context
from moebius.model.ffn import FeedForward
from moebius.model.mixers import Mixer
from moebius.model.weight import named_weights

from .common import attributes, close, context, fresh, hidden, noise, same_attributes

LENGTH = 13


def apply(module: nn.Module, x_BTD: Tensor, ctx: Context) -> Tensor:
    """The output of a mixer, feed-forward or block over whole sequences."""
    if isinstance(module, Block):
        return module(x_BTD, ctx, None, {}).x_BTD
    if isinstance(module, FeedForward):
        return module(x_BTD, ctx)[0]
    assert isinstance(module, Mixer), f"{type(module).__name__} is no mixer, feed-forward or block"
    y_BTD, state, lent = module(x_BTD, ctx, None, {})
    assert state is None, "a state came back although none was given"
    assert set(lent) == set(module.lends), f"lent {sorted(lent)}, declared {sorted(module.lends)}"
    return y_BTD


@torch.no_grad()
def check_finite(config: Any) -> None:
    """Outputs are finite and of the shape of the input: no weight was left uninitialised."""
    x_BTD = hidden(2, LENGTH)
    y_BTD = apply(fresh(config), x_BTD, context((LENGTH,), (5, 8)))
    assert y_BTD.shape == x_BTD.shape
    assert y_BTD.isfinite().all(), (
        "the output is not finite after `initialise`: is every weight an attribute of its module?"
    )


@torch.no_grad()
def check_causal(config: Any) -> None:
    """Changing token t changes no output before t, and changes its own."""
    module, x_BTD, ctx = fresh(config), hidden(2, LENGTH), context((LENGTH,), (LENGTH,))
    y_BTD = apply(module, x_BTD, ctx)
    for t in range(LENGTH):
        changed_BTD = x_BTD.clone()
        changed_BTD[:, t] += noise(2, x_BTD.shape[-1], seed=2 + t, dtype=x_BTD.dtype)
        moved_BT = (apply(module, changed_BTD, ctx) - y_BTD).abs().amax(-1)
        early = float(moved_BT[:, :t].amax()) if t else 0.0
        assert early < 1e-9, f"token {t} changed an output before it by {early:.3g}"
        assert (moved_BT[:, t] > 1e-9).all(), f"token {t} does not change its own output"


@torch.no_grad()
def check_packed(config: Any) -> None:
    """Documents packed into one sequence come out as each alone."""
    module, x_BTD = fresh(config), hidden(2, LENGTH)
    rows = ((4, 3, 6), (1, 12))
    y_BTD = apply(module, x_BTD, context(*rows))
    for b, row in enumerate(rows):
        start = 0
        for length in row:
            document = (slice(b, b + 1), slice(start, start + length))
            alone_1TD = apply(module, x_BTD[document], context((length,)))
            close(y_BTD[document], alone_1TD, f"document {start}:{start + length} of row {b}")
            start += length


def check_gradients(config: Any) -> None:
    """Gradients reach the input and every weight."""
    module, x_BTD = fresh(config), hidden(4, 32).requires_grad_()
    y_BTD = apply(module, x_BTD, context(*4 * [(32,)]))
    (y_BTD * noise(*y_BTD.shape, seed=3, dtype=y_BTD.dtype)).sum().backward()
    for name, tensor in [("the input", x_BTD), *named_weights(module)]:
        grad = tensor.grad
        assert grad is not None, f"no gradient reaches {name}"
        assert grad.isfinite().all(), f"the gradient of {name} is not finite"
        share = float((grad != 0).double().mean())
        assert share > 0.9, f"only {share:.0%} of {name} gets a gradient"


def check_pure(config: Any) -> None:
    """A forward in training may run twice: it writes nothing, and gives the same bits."""
    module, x_BTD, ctx = fresh(config).train(), hidden(2, LENGTH), context((5, 8), (LENGTH,))
    given = {"x": x_BTD, **{f.name: getattr(ctx, f.name) for f in dataclasses.fields(ctx)}}
    copies = {name: tensor.clone() for name, tensor in given.items()}
    before = attributes(module)
    first_BTD = apply(module, x_BTD, ctx)
    same_attributes(before, module, "forward")
    assert torch.equal(apply(module, x_BTD, ctx), first_BTD), "a second forward gives other bits"
    edited = [name for name, tensor in given.items() if not torch.equal(tensor, copies[name])]
    assert not edited, f"forward edited its input in place: {', '.join(edited)}"


@torch.no_grad()
def check_fp64(config: Any) -> None:
    """fp64 stays fp64 all through, and fp32 is close to it."""
    module, ctx = fresh(config), context((5, 8), (LENGTH,))
    y_BTD = apply(module, hidden(2, LENGTH), ctx)
    assert y_BTD.dtype == torch.float64, f"fp64 came back as {y_BTD.dtype}"
    single_BTD = apply(module, hidden(2, LENGTH, torch.float32), ctx)
    assert single_BTD.dtype == torch.float32, f"fp32 came back as {single_BTD.dtype}"
    close(single_BTD.double(), y_BTD, "fp32 against fp64", tolerance=1e-4)
    twin = fresh(config).double()
    close(apply(twin, hidden(2, LENGTH), ctx), y_BTD, "fp64 weights", tolerance=1e-6)


@torch.no_grad()
def check_bf16(config: Any) -> None:
    """bf16 stays near fp32 for nearly all tokens (routing may flip at a near-tie)."""
    module, ctx = fresh(config), context(*4 * [(32,)])
    x_BTD = hidden(4, 32, torch.bfloat16)
    y_BTD = apply(module, x_BTD, ctx)
    assert y_BTD.dtype == torch.bfloat16, f"bf16 came back as {y_BTD.dtype}"
    want_BTD = apply(module, x_BTD.float(), ctx)
    error_BT = (y_BTD.float() - want_BTD).norm(dim=-1) / want_BTD.norm(dim=-1)
    worst = float(error_BT.quantile(0.95))
    assert worst < 0.05, f"bf16 is off by {worst:.1%} at the 95th percentile of tokens"


FLOW_CHECKS = (
    check_finite,
    check_causal,
    check_packed,
    check_gradients,
    check_pure,
    check_fp64,
    check_bf16,
)
