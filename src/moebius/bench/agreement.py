"""Agreement before any ratio: values and gradients against the naive path, by relative norms.

A figure of speed says nothing of an op that computes something else, so every benchmark compares
first and leaves its ratios out where the error is above the tolerance of the dtype.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moebius.data.loader import Batch
from moebius.model.ffn.moe import MoELayer, routers_of
from moebius.model.lm import LM
from moebius.ops.attention import attention, attention_naive
from moebius.ops.experts import BACKENDS, ExpertOp, experts
from moebius.ops.loss import head_cross_entropy, head_cross_entropy_naive
from moebius.train.passes import context_of

# Relative error allowed between the naive form and a fast one, norm-wise, by dtype.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}


def relative(truth: Tensor, other: Tensor) -> float:
    """The norm of the difference over that of the truth."""
    return float((other.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))


def leaf(x: Tensor) -> Tensor:
    """A copy that gathers a gradient of its own."""
    return x.detach().clone().requires_grad_()


def values_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output, then the gradient of each input for a random gradient of the output."""
    leaves = [leaf(x) for x in inputs]
    y = function(*leaves)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def error(truth: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest relative error of a list of tensors."""
    return max(relative(a, b) for a, b in zip(truth, other, strict=True))


def agree(errors: Mapping[str, float], dtype: torch.dtype) -> bool:
    """Whether all of them are within the dtype's tolerance; NaN is not."""
    return all(found <= TOLERANCE[dtype] for found in errors.values())


def experts_error(model: LM, batch: Batch, dtype: torch.dtype) -> float | None:
    """Of the experts in use against the naive loop, on the model's own routing; None without."""
    ctx = context_of(batch, 0)
    h_BTD = torch.nn.functional.rms_norm(model.embed(batch.tokens_BT, dtype), (model.config.width,))
    errors: list[float] = []
    for block in model.blocks():
        for moe in routers_of(block):
            pending = moe.begin(h_BTD.detach(), ctx)
            assert pending.index_NS is not None and pending.weight_NS is not None
            own = [x for x in _weights(moe) if x is not None]
            inputs = (h_BTD.flatten(0, 1), pending.weight_NS, *own)
            naive, fast = (
                values_and_gradients(_of_layer(moe, op, pending.index_NS), inputs)
                for op in (BACKENDS["naive"], experts)
            )
            errors.append(error(naive, fast))
    return max(errors, default=None)


def _weights(moe: MoELayer) -> tuple[Tensor | None, ...]:
    return (moe.w_gate_up_E2FD, moe.w_down_EDF, moe.b_gate_up_E2F, moe.b_down_ED)


def _of_layer(moe: MoELayer, op: ExpertOp, index_NS: Tensor) -> Callable[..., Tensor]:
    """An op as a function of the input, the gates, and those weights that the layer has."""

    def compute(x_ND: Tensor, weight_NS: Tensor, *own: Tensor) -> Tensor:
        given = iter(own)
        gate_up, down, b_gate_up, b_down = (
            None if x is None else next(given) for x in _weights(moe)
        )
        assert gate_up is not None and down is not None
        biases = (b_gate_up, b_down)
        return op(x_ND, index_NS, weight_NS, gate_up, down, *biases, moe.activation)

    return compute


def attention_error(batch: Batch, device: torch.device, dtype: torch.dtype) -> float:
    """Of attention in use against the naive form: 4 heads of 64, 2 of keys, a batch's documents."""
    mask_BTS = context_of(batch, 0).attend_BTT
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(*mask_BTS.shape[:2], heads, 64, generator=generator).to(device, dtype)
        for heads in (4, 2, 2)
    ]
    scale = 64**-0.5
    naive = values_and_gradients(lambda q, k, v: attention_naive(q, k, v, mask_BTS, scale), inputs)
    fast = values_and_gradients(
        lambda q, k, v: attention(q, k, v, mask_BTS, scale, causal=True), inputs
    )
    return error(naive, fast)


def loss_error(model: LM, batch: Batch, dtype: torch.dtype) -> float:
    """Of the loss in use against the naive form, on a model's own head."""
    h_ND = model.head.norm(model.embed(batch.tokens_BT, dtype)).flatten(0, 1)
    targets = (batch.targets_BT.flatten(), batch.valid_BT.flatten())
    inputs = (h_ND, model.head.w_VD)
    naive = values_and_gradients(lambda h, w: head_cross_entropy_naive(h, w, *targets), inputs)
    fast = values_and_gradients(lambda h, w: head_cross_entropy(h, w, *targets), inputs)
    return error(naive, fast)


def model_errors(
    model: LM, batch: Batch, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """The ops that a model's step is made of, each in use against its naive form."""
    own = experts_error(model, batch, dtype)
    return {
        **({} if own is None else {"experts": own}),
        "attention": attention_error(batch, device, dtype),
        "loss": loss_error(model, batch, dtype),
    }
