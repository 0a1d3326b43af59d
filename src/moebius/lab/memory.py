"""What training takes in memory, planned on the meta device: exact for states, an estimate for
activations.

Weights and gradients are in fp32 (fp64 runs: fp64), optimizer states of the shapes that the run's
rules make. Activations per token are estimated as what fused kernels cannot do without: every
product with a weight keeps its input and its output, half as much again behind a gate (SwiGLU),
experts by their mean share, the router in fp32; the loss keeps one width. Torch's plain operators
keep more (1.1 to 1.5 times as much at nano size in fp32), kernels for the CPU less. With recompute
a layer keeps its input, and the largest layer's activations come once on top.
"""

import dataclasses
from collections import defaultdict

import torch

from moebius.model.count import Use, uses
from moebius.model.lm import LM
from moebius.ops.loss.chunked import CHUNK
from moebius.train.run import Run
from moebius.train.weights import optimizer_of, weights_of


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes. `kept` is per token, `casts` the weights in the dtype of activations; `_recompute`
    is with activation recompute."""

    weights: int
    gradients: int
    optimizer: int
    casts: int
    casts_recompute: int
    loss: int
    kept: int
    kept_recompute: int

    def training(self, tokens: int, recompute: bool) -> int:
        """All of it for a micro-batch of so many tokens."""
        casts, kept = self.casts, self.kept
        if recompute:
            casts, kept = self.casts_recompute, self.kept_recompute
        return self.weights + self.gradients + self.optimizer + casts + self.loss + tokens * kept


def optimizer_bytes(run: Run, model: LM) -> dict[str, int]:
    """Bytes of the optimizer's states of each weight, by its name; the model is on meta."""
    with torch.device("meta"):
        optimizer = optimizer_of(run, weights_of(model))
    return {
        slot.name: sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        for group in optimizer.groups.values()
        for slot, state in zip(group.slots, group.states, strict=True)
    }


def memory_of(run: Run, model: LM) -> Memory:
    """The memory of a run whose model is on the meta device."""
    weights = uses(model)
    master = 8 if run.precision == "fp64" else 4
    dtype = {"fp64": 8, "fp32": 4}.get(run.precision, 2)
    size = sum(use.weight.numel() for use in weights)
    kept: defaultdict[str, float] = defaultdict(float)
    casts: defaultdict[str, int] = defaultdict(int)
    for use in weights:
        if use.weight.is_matrix and use.group != "head":
            kept[_part(use)] += kept_bytes(use, dtype)
            casts[_part(use)] += use.weight.numel() * (dtype if dtype < master else 0)
    head_width, vocab = model.config.width, model.vocab
    kept["head"] = head_width * dtype
    layers = [name for name in kept if name.startswith("layers.")]
    largest = max((kept[name] for name in layers), default=0.0)
    inputs = len(layers) * model.config.width * dtype
    outside = sum(amount for name, amount in kept.items() if name not in layers)
    casts_outside = sum(amount for name, amount in casts.items() if name not in layers)
    largest_casts = max((casts[name] for name in layers), default=0)
    head = head_width * vocab
    return Memory(
        weights=size * master,
        gradients=size * master,
        optimizer=sum(optimizer_bytes(run, model).values()),
        casts=sum(casts.values()),
        casts_recompute=casts_outside + largest_casts,
        # The head cast, its gradient, and the logits of one chunk.
        loss=head * ((dtype if dtype < master else 0) + master) + CHUNK * vocab * master,
        kept=round(sum(kept.values())),
        kept_recompute=round(outside + inputs + largest),
    )


def _part(use: Use) -> str:
    """`layers.3`, or the first part of a name outside the layers."""
    parts = use.name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]


def kept_bytes(use: Use, dtype: int) -> float:
    """Bytes per token that a product with a weight [..., O, I] leaves for the backward."""
    weight = use.weight
    outputs, inputs = weight.shape[-2], weight.shape[-1]
    gate = 1.5 if weight.blocks == 2 else 1.0
    matrices = weight.numel() / (outputs * inputs)
    size = max(dtype, 4) if use.group == "router" else dtype
    return use.share[1] * matrices * (inputs + gate * outputs) * size
