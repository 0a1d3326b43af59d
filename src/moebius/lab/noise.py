"""The gradient noise scale of a run, and the rate of routed experts that follows from it.

B_noise = tr(Sigma) / |G|^2 (McCandlish et al. 2018, arXiv 1812.06162, A.1): the batch, in tokens,
at which noise and gradient are of one size. Measured at one point of a run, from the gradients of
micro-batches against their mean over a batch, on the batches that come next; nothing is updated.
Gradients are of the training objective, balance losses and ends included, in the masters' dtype.
"""

import dataclasses
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius import checkpoint
from moebius.data.loader import Batch, Loader
from moebius.model.ffn.moe import routers_of
from moebius.model.lm import LM
from moebius.model.weight import named_weights
from moebius.optim.noise import expert_lr_multiplier, noise_scale
from moebius.optim.rules.adamw import AdamW
from moebius.train.folder import RunFolder
from moebius.train.passes import forward_backward
from moebius.train.run import Run
from moebius.train.sections import section_at, sections_of
from moebius.train.session import Progress, Say, device_of, in_force, open_stages, read_run
from moebius.train.state import TrainState, new_state

ALL = "all"
DRAWS = 2000
# Squared norms by role, and of all weights together.
Squares = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Repeat:
    """One batch: the mean squared norm of its micro-batches' gradients, and that of their mean."""

    small: Squares
    big: Squares
    # Targets of a micro-batch, on average, and of the batch.
    small_tokens: float
    big_tokens: int


def noise_of_folder(
    path: Path, *, repeats: int = 8, micro: int = 1, say: Say = print, progress: Progress | None
) -> dict[str, Any]:
    """The noise scale at the newest checkpoint of a run's folder, or at its start without one."""
    folder = RunFolder.open(path)
    run, _ = read_run(folder)
    newest = checkpoint.latest_intact(folder.checkpoints, say=say)
    tensors, counters = ({}, {"step": 0}) if newest is None else checkpoint.load(newest)
    if newest is None:
        say(f"{path} has no checkpoint: measured at initialisation")
    section = section_at(sections_of(run), counters["step"])
    state = new_state(in_force(run, section), device_of(run))
    if newest is not None:
        state.take_weights(tensors)
    state.step = counters["step"]
    return _measure(run, state, repeats, micro, progress)


def noise_at_start(
    run: Run, *, repeats: int = 8, micro: int = 1, progress: Progress | None = None
) -> dict[str, Any]:
    """The noise scale of a recipe's model as it is initialised."""
    return _measure(run, new_state(run, device_of(run)), repeats, micro, progress)


def _measure(
    run: Run, state: TrainState, repeats: int, micro: int, progress: Progress | None
) -> dict[str, Any]:
    if repeats < 2:
        raise ValueError(f"repeats must be at least 2 to say how sure the figure is, not {repeats}")
    section = section_at(sections_of(run), state.step)
    if not 1 <= micro < section.batch:
        raise ValueError(
            f"micro must lie in 1..{section.batch - 1}: the batch, {section.batch} sequences, is "
            f"measured against parts of it; not {micro}"
        )
    _, loaders = open_stages(run, progress)
    found: list[Repeat] = []
    for batch in _batches(loaders[section.index], state.step, repeats):
        found.append(one_repeat(state.model, batch.to(device_of(run)), micro, state.step))
        if progress is not None:
            progress("gradients", len(found), repeats)
    return _result(run, state, found)


def _batches(loader: Loader, step: int, repeats: int) -> Iterator[Batch]:
    return (loader.batch(step + i) for i in range(repeats))


# --- gradients ------------------------------------------------------------------------------------


def one_repeat(model: LM, batch: Batch, micro: int, step: int) -> Repeat:
    """The gradients of a batch's micro-batches of `micro` sequences, each a mean over its own."""
    dtype = next(model.parameters()).dtype
    summed: dict[str, Tensor] = {}
    squares: list[Squares] = []
    tokens: list[int] = []
    for part in batch.split(micro):
        count = int(part.valid_BT.sum())
        model.zero_grad(set_to_none=True)
        alone = dataclasses.replace(part, num_targets=count)
        forward_backward(model, [alone], step, dtype, recompute=False)
        grads = {name: w.grad for name, w in named_weights(model) if w.grad is not None}
        squares.append(_squares(model, grads))
        tokens.append(count)
        for name, grad in grads.items():
            summed[name] = summed[name] + count * grad if name in summed else count * grad
    model.zero_grad(set_to_none=True)
    mean = {name: grad / sum(tokens) for name, grad in summed.items()}
    small = {role: sum(each[role] for each in squares) / len(squares) for role in squares[0]}
    return Repeat(small, _squares(model, mean), sum(tokens) / len(tokens), sum(tokens))


def _squares(model: LM, grads: Mapping[str, Tensor]) -> Squares:
    """Squared norms by role; a role without gradients is 0."""
    squares: Squares = {ALL: 0.0}
    for name, weight in named_weights(model):
        square = 0.0
        if name in grads:
            square = float(torch.linalg.vector_norm(grads[name], dtype=torch.float64).square())
        for role in (ALL, weight.role):
            squares[role] = squares.get(role, 0.0) + square
    return squares


# --- figures --------------------------------------------------------------------------------------


def scale_of(found: Sequence[Repeat], role: str = ALL) -> dict[str, Any]:
    """B_noise in tokens with a 95% bootstrap interval over the repeats; None: without bound.

    The two parts are averaged first and divided then, in every draw of the bootstrap too.
    """
    pairs = [_parts(each, role) for each in found]
    chance = random.Random(0)
    draws = sorted(_ratio(chance.choices(pairs, k=len(pairs))) for _ in range(DRAWS))
    ends = (draws[round(0.025 * (DRAWS - 1))], draws[round(0.975 * (DRAWS - 1))])
    signal, noise = (sum(part) / len(pairs) for part in zip(*pairs, strict=True))
    return {
        "noise_tokens": _finite(_ratio(pairs)),
        "ci95": [_finite(end) for end in ends],
        "gradient_norm_sq": signal,
        "trace": noise,
    }


def _parts(each: Repeat, role: str) -> tuple[float, float]:
    # In whole thousandths of a token: micro-batches need not have the same number of targets.
    sizes = (round(1000 * each.small_tokens), 1000 * each.big_tokens)
    signal, noise = noise_scale(each.small[role], each.big[role], *sizes)
    return signal, noise / 1000


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """tr(Sigma) / |G|^2; infinite where noise hides the gradient, 0 where it has none itself."""
    signal, noise = (sum(part) for part in zip(*pairs, strict=True))
    return max(0.0, noise) / signal if signal > 0 else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _result(run: Run, state: TrainState, found: Sequence[Repeat]) -> dict[str, Any]:
    total = scale_of(found)
    batch, noise = found[0].big_tokens, total["noise_tokens"]
    layers = _layers(state.model, batch, noise)
    return {
        "run": run.name,
        "step": state.step,
        "repeats": len(found),
        "small_tokens": found[0].small_tokens,
        "batch_tokens": batch,
        **total,
        "x": None if not noise else batch / noise,
        "roles": {role: scale_of(found, role) for role in found[0].small if role != ALL},
        "layers": layers,
        "says": _says(run, layers, noise),
    }


def _layers(model: LM, batch: int, noise: float | None) -> dict[str, dict[str, Any]]:
    """m(x) of every router's layer; the same for the layers of one layout."""
    layers: dict[str, dict[str, Any]] = {}
    for i, block in enumerate(model.blocks()):
        for j, moe in enumerate(routers_of(block)):
            layout = moe.layout
            # Zero-computation experts learn nothing: what counts is the share of one FFN expert.
            share = Fraction(layout.ffn_per_token / layout.num_ffn).limit_denominator(10_000)
            row: dict[str, Any] = {"experts": layout.num_ffn, "chosen": layout.ffn_per_token}
            if noise:
                k, e = share.numerator, share.denominator
                row["multiplier"] = expert_lr_multiplier(batch, noise, e, k)
            layers[f"{i}.{j}" if j else str(i)] = row
    return layers


def noise_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A result as rows to print: of all weights, then by role."""
    scales = {ALL: found, **found["roles"]}
    return [
        {
            "weights": name,
            "noise scale, tokens": scale["noise_tokens"],
            "from": scale["ci95"][0],
            "to": scale["ci95"][1],
        }
        for name, scale in scales.items()
    ]


def _says(run: Run, layers: Mapping[str, Mapping[str, Any]], noise: float | None) -> str:
    """How to use the figure, in one sentence."""
    if noise is None:
        return "the noise hides the gradient: measure with more repeats or a larger batch"
    found = [row["multiplier"] for row in layers.values() if "multiplier" in row]
    if not found:
        return f"the noise scale is {noise:,.0f} tokens; there are no routed experts to slow down"
    role = run.optim.roles.get("expert")
    text = f"train with optim.roles.expert.lr={sum(found) / len(found):.3g}"
    if role is not None and not isinstance(role.rule, AdamW):
        text += ", but with AdamW: it is derived for Adam's updates, and experts move by "
        text += type(role.rule).__name__ + " here"
    return text
