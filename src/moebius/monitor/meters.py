"""Meters: plain numbers from what was tapped and from what routers counted.

Cheap enough to be on for every logged step. Sources: LongCat-Flash 3.1.3 (router similarity, R_g),
nmoe's post 0002 (CV, entropy, effective experts, dead experts). Letters: E router outputs, S
selected.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moebius.monitor.tap import Observer

# What is tapped of a tensor that was rounded to a low-precision format.
ROUNDING = ("underflow", "saturated", "outliers")


def alone(x: Tensor) -> Tensor:
    """The sum over one process."""
    return x


class Meter(Observer):
    """Sums what it sees over the micro-batches of one step.

    `summed` adds a tensor up over all processes; all of them must ask for the same then.
    """

    def __init__(self, summed: Callable[[Tensor], Tensor] = alone) -> None:
        self._summed = summed
        self._square: dict[str, Tensor] = {}
        self._elements: dict[str, int] = {}
        self._gradient: dict[str, Tensor] = {}
        # By share (`underflow/x`) and by weight: what was seen over micro-batches.
        self._rounding: dict[str, dict[str, list[Tensor]]] = {}

    def see(self, name: str, x: Tensor) -> None:
        place, _, share = name.partition("/")
        if share.partition("/")[0] in ROUNDING:
            self._rounding.setdefault(share, {}).setdefault(place, []).append(x)
        if not name.endswith("/hidden"):
            return
        square = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum()
        self._square[name] = self._square.get(name, 0.0) + square
        self._elements[name] = self._elements.get(name, 0) + x.numel()

    def see_gradient(self, name: str, grad: Tensor, index: Tensor) -> None:
        sums = torch.bincount(index.flatten(), weights=grad.flatten().double())
        known = self._gradient.get(name, sums.new_zeros(0))
        size = max(len(known), len(sums))
        self._gradient[name] = _padded(known, size) + _padded(sums, size)

    def hidden_rms(self, layers: int) -> list[float]:
        """Root mean square of the residual stream after each of so many layers, wherever it is."""
        names = [f"layers/{i}/hidden" for i in range(layers)]
        pairs = [(float(self._square.get(n, 0)), self._elements.get(n, 0)) for n in names]
        seen_L2 = self._summed(torch.tensor(pairs, dtype=torch.float64))
        return [math.sqrt(square / max(1, elements)) for square, elements in seen_L2.tolist()]

    def score_gradient(self, layer: int, outputs: int = 0) -> Tensor | None:
        """dL/dP_E of the language-model loss at a layer's router of so many outputs, P the
        batch-mean scores."""
        none = torch.zeros(0, dtype=torch.float64)
        grad_E = self._gradient.get(f"layers/{layer}/score", none).cpu()
        size = max(outputs, len(grad_E))
        seen = grad_E.new_full((1,), float(len(grad_E)))
        grad_E, seen = self._summed(torch.cat([_padded(grad_E, size), seen])).split([size, 1])
        return grad_E if float(seen) else None

    def rounding(self) -> dict[str, dict[str, Any]]:
        """What low-precision formats lost: shares of values by kind and tensor (`underflow/x`).

        Each as the mean over weights, and the largest with the weight it is `at`.
        """
        found: dict[str, dict[str, Any]] = {}
        for share, places in sorted(self._rounding.items()):
            means = {place: float(torch.stack(xs).mean()) for place, xs in places.items()}
            at = max(means, key=lambda place: means[place])
            mean = sum(means.values()) / len(means)
            found[share] = {"mean": round(mean, 6), "max": round(means[at], 6), "at": at}
        return found


def _padded(x: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, size - len(x)))


def load_metrics(count_E: Tensor, num_ffn: int, hist_S: Tensor) -> dict[str, Any]:
    """Balance of one router from its counts: load, entropy, dead experts, FFN experts a token."""
    count = count_E.double().cpu()
    ffn = count[:num_ffn]
    share = ffn / ffn.sum().clamp(min=1)
    entropy = float(-(share * share.clamp(min=1e-30).log()).sum())
    hist = hist_S.double().cpu()
    hist = hist / hist.sum().clamp(min=1)
    picks = torch.arange(len(hist), dtype=torch.float64)
    mean = float((hist * picks).sum())
    load = count / count.sum().clamp(min=1)
    return {
        "load": [round(value, 6) for value in load.tolist()],
        "num_ffn": num_ffn,
        "load_cv": float(ffn.std(unbiased=False) / ffn.mean().clamp(min=1e-30)),
        "max_load": float(share.max()),
        "entropy": entropy,
        "effective_experts": math.exp(entropy),
        "dead_experts": int((ffn == 0).sum()),
        "ffn_mean": mean,
        "ffn_std": math.sqrt(max(0.0, float((hist * picks.square()).sum()) - mean**2)),
        "ffn_hist": [round(value, 6) for value in hist.tolist()],
    }


def router_similarity(w_ED: Tensor) -> float:
    """Mean pairwise cosine similarity of the router's rows (LongCat-Flash 3.1.3)."""
    unit_ED = torch.nn.functional.normalize(w_ED.detach().float(), dim=-1)
    num_rows = unit_ED.shape[0]
    total = unit_ED.sum(0).square().sum() - num_rows
    return float(total / max(1, num_rows * (num_rows - 1)))


def gradient_ratio(balance_E: Tensor, language_E: Tensor | None) -> float | None:
    """R_g: the balance loss's gradient norm over the language model's (LongCat-Flash eq. 9)."""
    if language_E is None:
        return None
    norm = float(language_E.norm())
    return float(balance_E.double().norm()) / norm if norm > 0 else None


def budget_summary(
    lines: Sequence[Mapping[str, Any]], targets: Mapping[str, float], window: int = 100
) -> dict[str, dict[str, float]]:
    """How well each router kept its budget over the last third of the logged lines.

    By layer: the target, the mean FFN experts per token, the mean of the window of `window` lines
    that is furthest from the target, and the mean standard deviation over tokens. A layer that is
    younger than those lines (a run that was grown) counts from its first one.
    """
    tail = lines[-max(1, len(lines) // 3) :]
    summary: dict[str, dict[str, float]] = {}
    for layer, target in targets.items():
        rows = [line["layers"][layer] for line in tail if layer in line["layers"]]
        if not rows:
            continue
        means = [row["ffn_mean"] for row in rows]
        size = min(window, len(means))
        windows = [sum(means[i : i + size]) / size for i in range(len(means) - size + 1)]
        summary[layer] = {
            "target": target,
            "mean": sum(means) / len(means),
            "worst_window": max(windows, key=lambda mean: abs(mean - target)),
            "std": sum(row["ffn_std"] for row in rows) / len(rows),
        }
    return summary
