"""A line of metrics: what one logged step was, from its result, the routers and the meter."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from moebius.model.count import Counts
from moebius.model.ffn.moe import MoELayer, routers_of
from moebius.model.lm import LM
from moebius.monitor.meters import Meter, gradient_ratio, load_metrics, router_similarity
from moebius.ops.ranks import summed
from moebius.parallel.plan import local
from moebius.train.state import TrainState
from moebius.train.step import StepResult


def step_line(
    state: TrainState, result: StepResult, meter: Meter, counts: Counts
) -> dict[str, Any]:
    """The line of the step just done, but for its clock (which is not part of what is exact).

    Collective on several ranks, with the same line on each.
    """
    layers = layer_metrics(state, result, meter)
    sizes = {"active_min": counts.active_min, "active_max": counts.active_max}
    sizes["active_mean"] = active_now(state.model, counts, layers)
    return {
        "step": state.step,
        "tokens": state.tokens,
        "loss": result.loss,
        "loss_hex": result.loss.hex(),
        "grad_norm": result.grad_norm,
        "skipped": state.skipped,
        **result.sums,
        **_clipping(state, result),
        **sizes,
        "layers": layers,
        "hidden_rms": meter.hidden_rms(len(state.model.layers)),
        **({"rounding": rounding} if (rounding := meter.rounding()) else {}),
        "roles": role_metrics(state, result.update_ratios),
    }


def _clipping(state: TrainState, result: StepResult) -> dict[str, Any]:
    """The largest attention logit and the heads clipped so far, at steps where QK-Clip looked."""
    if result.clipped is None:
        return {}
    return {"qk_logit_max": result.clipped.logit_max, "qk_clipped": state.clipped_heads}


def layer_metrics(state: TrainState, result: StepResult, meter: Meter) -> dict[str, dict[str, Any]]:
    """Router metrics by layer, of the layers that have a router."""
    metrics: dict[str, dict[str, Any]] = {}
    names = {id(module): name for name, module in state.model.named_modules()}
    for i, (block, stats) in enumerate(zip(state.model.blocks(), result.stats, strict=True)):
        routers = routers_of(block)
        for j, (moe, routed) in enumerate(zip(routers, stats, strict=True)):
            line = load_metrics(routed.count_E, moe.layout.num_ffn, routed.hist_S)
            slots = max(1, int(routed.num_tokens)) * moe.layout.top_k
            line["dropped"] = int(routed.num_dropped) / slots
            line["recycled"] = int(routed.num_recycled) / slots
            line["mean_score"] = float(routed.score_sum_E.mean()) / max(1, int(routed.num_tokens))
            bias_E = moe.bias_E()[: moe.layout.num_ffn]
            line["bias_min"], line["bias_max"] = float(bias_E.min()), float(bias_E.max())
            line["router_similarity"] = _similarity(state, names[id(moe.router)], moe.router)
            # The taps of a layer have one name, so those of several routers cannot be told apart.
            outputs = moe.layout.num_outputs
            language_E = meter.score_gradient(i, outputs) if len(routers) == 1 else None
            line["r_g"] = _balance_ratio(moe, routed, language_E)
            metrics[_label(i, j, len(routers))] = line
    return metrics


def budgets(model: LM) -> dict[str, float]:
    """The mean FFN experts per token that each router aims at, by the labels of the metrics."""
    targets: dict[str, float] = {}
    for i, block in enumerate(model.blocks()):
        routers = routers_of(block)
        for j, moe in enumerate(routers):
            targets[_label(i, j, len(routers))] = moe.layout.ffn_per_token
    return targets


def _label(layer: int, router: int, num_routers: int) -> str:
    """`3`, or `3.0`, `3.1` where a layer has several routers."""
    return str(layer) if num_routers == 1 else f"{layer}.{router}"


def _similarity(state: TrainState, name: str, router: nn.Module) -> float | None:
    for key, weight in router.named_parameters():
        if weight.ndim == 2:
            w_ED = state.weights.whole(f"{name}.{key}", weight)
            return router_similarity(w_ED)
    return None


def _balance_ratio(moe: MoELayer, routed: Any, language_E: Tensor | None) -> float | None:
    total_E: Tensor | None = None
    for rule in moe.balance_rules():
        grad_E = rule.probability_gradient(routed)
        if grad_E is not None:
            total_E = grad_E if total_E is None else total_E + grad_E
    return None if total_E is None else gradient_ratio(total_E, language_E)


def role_metrics(state: TrainState, ratios: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Gradient RMS of each role (after clipping, what the optimizer saw), and its update ratio."""
    square: dict[str, Tensor] = {}
    elements: dict[str, int] = {}
    for slot, weight in state.weights.slots:
        # A gradient of nothing is no gradient.
        part = local(weight)[:0] if weight.grad is None else local(weight.grad)
        norm = torch.linalg.vector_norm(part)
        shape = weight.shape if slot.shard is None else slot.shard.shape
        square[slot.role] = square.get(slot.role, 0.0) + norm.double().square()
        elements[slot.role] = elements.get(slot.role, 0) + math.prod(shape)
    own = state.weights.world.ranks.weights
    square = {role: summed(total, own) for role, total in square.items()}
    metrics = {role: {"grad_rms": float((square[role] / elements[role]).sqrt())} for role in square}
    for role, ratio in ratios.items():
        metrics.setdefault(role, {})["update_ratio"] = float(ratio)
    return metrics


def active_now(model: LM, counts: Counts, layers: dict[str, dict[str, Any]]) -> int:
    """Mean active parameters at the budget measured now."""
    shift = 0.0
    for i, block in enumerate(model.blocks()):
        routers = routers_of(block)
        for j, moe in enumerate(routers):
            stacks = (moe.w_gate_up_E2FD, moe.w_down_EDF)
            per_expert = sum(math.prod(stack.shape[1:]) for stack in stacks)
            measured = layers[_label(i, j, len(routers))]["ffn_mean"]
            shift += (measured - moe.layout.ffn_per_token) * per_expert
    return round(counts.active_mean + shift)
