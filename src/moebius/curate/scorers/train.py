"""Training a linear scorer from labelled examples, with what it gets right on held-out ones.

Adagrad (Duchi et al. 2011) on batches, the weights averaged over the second half; a temperature
(Guo et al. 2017) makes probabilities mean what they say. Of each class a tenth of the examples, by
hash, finds the temperature and another tenth is only ever judged. Letters: V places, C classes, N
examples of a batch, F all their features.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moebius.curate.scorers.linear import LinearModel, Shape
from moebius.curate.text import hash_of

Example = tuple[str, str]
LEAST = 10
_BINS = 10


@dataclasses.dataclass(frozen=True)
class Options:
    """How a linear scorer is trained: `rate` is Adagrad's, `decay` the pull of weights to zero."""

    epochs: int = 5
    rate: float = 0.5
    batch: int = 64
    decay: float = 3e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or self.rate <= 0 or self.decay < 0:
            raise ValueError("epochs and batch must be at least 1, rate above 0, decay not below 0")


DEFAULT_SHAPE, DEFAULT_OPTIONS = Shape(), Options()


@dataclasses.dataclass(frozen=True)
class Judged:
    """How well a scorer's classes fit labels. `majority` is the share of the commonest label.

    `calibration_error` is the mean gap between confidence and accuracy over ten bins of confidence,
    weighted by how many examples lie in each.
    """

    num_examples: int
    accuracy: float
    majority: float
    log_loss: float
    calibration_error: float
    recall: Mapping[str, float]
    # How many examples have each label, and how many got it as the answer.
    labels: Mapping[str, int]
    answers: Mapping[str, int]
    # "label -> answer": how many, where they differ.
    confused: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples to learn from, to find the temperature with, and to judge by."""

    train: list[Example]
    calibrate: list[Example]
    heldout: list[Example]
    num_repeated: int
    # Texts that came with several labels: none of them is used.
    num_contradictory: int


def train_linear(
    examples: Iterable[Example], shape: Shape = DEFAULT_SHAPE, options: Options = DEFAULT_OPTIONS
) -> tuple[LinearModel, Judged]:
    """A scorer from (text, label) pairs, and how it does on the held-out tenth.

    Features of all examples are held in memory: at most 24 KiB each at 4096 characters. Raises
    ValueError for fewer than two classes, or a class of fewer than ten distinct texts.
    """
    parts = split(examples, options.seed)
    classes = tuple(sorted({label for _, label in parts.train}))
    rows = _Rows(parts.train, classes, shape)
    weights_VC = _fit(rows, len(classes), options)
    raw = LinearModel(classes, weights_VC, 1.0, shape)
    facts: dict[str, Any] = {
        "num_examples": dict(sorted(Counter(label for _, label in parts.train).items())),
        "num_repeated": parts.num_repeated,
        "num_contradictory": parts.num_contradictory,
        "training_sha256": digest_of(parts.train),
        "options": dataclasses.asdict(options),
    }
    model = dataclasses.replace(raw, temperature=_temperature(raw, parts.calibrate))
    judged = evaluate(model, parts.heldout)
    return dataclasses.replace(
        model, facts={**facts, "heldout": dataclasses.asdict(judged)}
    ), judged


def split(examples: Iterable[Example], seed: int = 0) -> Split:
    """Divide distinct examples by hash: of each class a tenth to calibrate, a tenth held out."""
    labels: dict[str, str | None] = {}
    repeated = 0
    for text, label in examples:
        if text not in labels:
            labels[text] = label
        elif labels[text] == label:
            repeated += 1
        else:
            labels[text] = None
    by_class: dict[str, list[str]] = {}
    for text, label in labels.items():
        if label is not None:
            by_class.setdefault(label, []).append(text)
    if len(by_class) < 2:
        raise ValueError(f"training needs examples of two classes or more, not {sorted(by_class)}")
    found = Split([], [], [], repeated, sum(label is None for label in labels.values()))
    for label, texts in sorted(by_class.items()):
        if len(texts) < LEAST:
            raise ValueError(
                f"class {label!r} has {len(texts)} distinct texts; give it at least {LEAST}"
            )
        texts.sort(key=lambda text: (hash_of(text, seed), text))
        tenth = len(texts) // 10
        found.calibrate.extend((text, label) for text in texts[:tenth])
        found.heldout.extend((text, label) for text in texts[tenth : 2 * tenth])
        found.train.extend((text, label) for text in texts[2 * tenth :])
    return found


def evaluate(model: LinearModel, examples: Iterable[Example]) -> Judged:
    """Judge a model on labelled examples, of its classes only."""
    labels: list[int] = []
    rows: list[list[float]] = []
    for text, label in examples:
        if label not in model.classes:
            raise ValueError(f"the scorer knows no class {label!r}, only {list(model.classes)}")
        labels.append(model.classes.index(label))
        rows.append(list(model.score([text])[0].values()))
    if not rows:
        raise ValueError("there are no examples to judge by")
    p_NC, y_N = np.array(rows), np.array(labels)
    best_N, sure_N = p_NC.argmax(1), p_NC.max(1)
    right_N = best_N == y_N
    bins_N = np.minimum((sure_N * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins_N, weights=sure_N - right_N, minlength=_BINS)
    counts = np.bincount(y_N, minlength=len(model.classes))
    pairs = Counter(zip(y_N[~right_N].tolist(), best_N[~right_N].tolist(), strict=True))
    names = model.classes
    return Judged(
        num_examples=len(rows),
        accuracy=float(right_N.mean()),
        majority=float(counts.max() / len(rows)),
        log_loss=float(-np.log(np.maximum(p_NC[np.arange(len(rows)), y_N], 1e-300)).mean()),
        calibration_error=float(np.abs(gaps).sum() / len(rows)),
        recall={
            names[c]: float(right_N[y_N == c].mean()) for c in range(len(names)) if counts[c] > 0
        },
        labels=dict(zip(names, counts.tolist(), strict=True)),
        answers={name: int((best_N == c).sum()) for c, name in enumerate(names)},
        confused={f"{names[y]} -> {names[a]}": n for (y, a), n in sorted(pairs.items())},
    )


def digest_of(examples: Iterable[Example]) -> str:
    """The sha256 of a training set, whatever the order of its examples."""
    each = sorted(hashlib.sha256(json.dumps(pair).encode()).digest() for pair in examples)
    return hashlib.sha256(b"".join(each)).hexdigest()


def read_examples(path: Path | str, text: str = "text", label: str = "label") -> Iterator[Example]:
    """The labelled examples of a .jsonl file; ValueError names the line that is none."""
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    yield str(row[text]), str(row[label])
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}:{number} is not an object with {text!r} and {label!r}"
                    ) from error
    except OSError as error:
        raise ValueError(f"cannot read the examples {path} ({error.strerror})") from error


class _Rows:
    """The features of examples laid end to end, and their classes."""

    def __init__(self, examples: list[Example], classes: tuple[str, ...], shape: Shape) -> None:
        index = {label: c for c, label in enumerate(classes)}
        self.y_N = np.array([index[label] for _, label in examples])
        self.features = [shape.features(text) for text, _ in examples]
        self.num_places = (1 << shape.bits) + 1

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places_F, values_F and the row within the batch of each."""
        chosen = [self.features[i] for i in rows]
        of_row_F = np.repeat(np.arange(len(rows)), [len(places) for places, _ in chosen])
        return (
            np.concatenate([places for places, _ in chosen]),
            np.concatenate([values for _, values in chosen]),
            of_row_F,
        )


def _fit(rows: _Rows, num_classes: int, options: Options) -> np.ndarray:
    """Weights_VC by Adagrad, the mean of those after each step of the second half."""
    # Classes first: a class's weights lie together, and a whole step is arithmetic on them.
    weights_CV = np.zeros((num_classes, rows.num_places), np.float32)
    mean_CV, squares_CV = np.zeros_like(weights_CV), np.full_like(weights_CV, 1e-8)
    chance = np.random.Generator(np.random.PCG64(options.seed))
    orders = (chance.permutation(len(rows.y_N)) for _ in range(options.epochs))
    size = options.batch
    steps = [order[i : i + size] for order in orders for i in range(0, len(order), size)]
    for step, chosen in enumerate(steps):
        places_F, values_F, row_F = rows.batch(chosen)
        starts_N = np.searchsorted(row_F, np.arange(len(chosen)))
        logits_NC = np.stack(
            [np.add.reduceat(w_V[places_F] * values_F, starts_N) for w_V in weights_CV], 1
        )
        p_NC = np.exp(logits_NC - logits_NC.max(1, keepdims=True))
        p_NC /= p_NC.sum(1, keepdims=True)
        p_NC[np.arange(len(chosen)), rows.y_N[chosen]] -= 1
        p_NC /= len(chosen)
        for c in range(num_classes):
            terms_F = values_F * p_NC[row_F, c]
            grad_V = np.bincount(places_F, weights=terms_F, minlength=rows.num_places)
            grad_V = grad_V.astype(np.float32) + options.decay * weights_CV[c]
            squares_CV[c] += np.square(grad_V)
            weights_CV[c] -= options.rate * grad_V / np.sqrt(squares_CV[c])
        if step >= len(steps) // 2:
            mean_CV += weights_CV
    return np.ascontiguousarray(mean_CV.T) / np.float32(len(steps) - len(steps) // 2)


def _temperature(model: LinearModel, examples: list[Example]) -> float:
    """What logits are divided by so that the log loss on these examples is least."""
    names = model.classes
    p_NC = np.array([list(model.score([text])[0].values()) for text, _ in examples])
    y_N = np.array([names.index(label) for _, label in examples])
    logits_NC = np.log(np.maximum(p_NC, 1e-300))
    best = (np.inf, 1.0)
    for temperature in np.geomspace(0.1, 10, 81):
        scaled_NC = logits_NC / temperature
        top_N1 = scaled_NC.max(1, keepdims=True)
        total_N = np.log(np.exp(scaled_NC - top_N1).sum(1)) + top_N1[:, 0]
        # Platt's targets: were all right, the best temperature would be none at all.
        wrong = 1 / (len(y_N) + len(names))
        right_NC = np.arange(len(names)) == y_N[:, None]
        targets_NC = np.where(right_NC, 1 - wrong * (len(names) - 1), wrong)
        loss = float((total_N - (targets_NC * scaled_NC).sum(1)).mean())
        best = min(best, (loss, float(temperature)))
    return best[1]
