"""Distilling a judge: have a dear scorer label some documents, and train a linear one on them.

Llama 3 (2407.21783, 3.1.1) had Llama 2 label pages by written requirements, and trained
DistilRoberta on the labels. The labelled examples are kept as .jsonl, so that a person can read
what was learned from.
"""

import dataclasses
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moebius.curate.document import Document
from moebius.curate.scorers import Scorer, Scores
from moebius.curate.scorers.linear import Shape
from moebius.curate.scorers.train import (
    DEFAULT_OPTIONS,
    DEFAULT_SHAPE,
    Judged,
    Options,
    read_examples,
    train_linear,
)

EXAMPLES, STUDENT, REPORT = "examples.jsonl", "student.safetensors", "distilled.json"


@dataclasses.dataclass(frozen=True)
class Distilled:
    """What came of it. `agreement` is how often the student answers as the judge on held-out texts.

    Agreement that chance alone would give is taken out of `kappa` (Cohen 1960).
    """

    num_labelled: int
    num_unscored: int
    labels: dict[str, int]
    agreement: float
    kappa: float
    heldout: Judged


def distil(
    judge: Scorer,
    documents: Iterable[Document],
    folder: Path | str,
    *,
    at_least: float | None = None,
    batch: int = 64,
    shape: Shape = DEFAULT_SHAPE,
    options: Options = DEFAULT_OPTIONS,
) -> Distilled:
    """Label `documents` and train a student; both, and a report, are written into `folder`.

    The label is the judge's best class; with `at_least`, "good" where its one number `score` is at
    least that, and else "bad". Documents that the judge cannot score are counted and left out. A
    judge with a cache goes on after an interruption without asking anything twice.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / EXAMPLES
    counts = _label(judge.build(), documents, path, at_least, batch)
    unscored = counts.pop(None, 0)
    labels = {str(label): count for label, count in sorted(counts.items(), key=str)}
    if sum(labels.values()) == 0:
        raise ValueError(f"the judge scored none of {unscored} documents; look at its answers")
    model, heldout = train_linear(read_examples(path), shape, options)
    model.save(folder / STUDENT)
    found = Distilled(
        num_labelled=sum(labels.values()),
        num_unscored=unscored,
        labels=labels,
        agreement=heldout.accuracy,
        kappa=_kappa(heldout),
        heldout=heldout,
    )
    _write(folder / REPORT, [dataclasses.asdict(found)], indent=2)
    return found


def _label(
    scores: Scores, documents: Iterable[Document], path: Path, at_least: float | None, batch: int
) -> Counter[str | None]:
    """Write the labelled documents; how many of each label, None for those without."""
    counts: Counter[str | None] = Counter()

    def rows() -> Iterator[dict[str, Any]]:
        rest = iter(documents)
        while chosen := list(itertools.islice(rest, batch)):
            found = scores.score([document.text for document in chosen])
            for document, given in zip(chosen, found, strict=True):
                label = _label_of(given, at_least)
                counts[label] += 1
                if label is not None:
                    named = {"source": document.source, "key": document.key, "scores": given}
                    text = document.text.encode("utf-8", "replace").decode()
                    yield {"text": text, "label": label, **named}

    _write(path, rows())
    return counts


def _label_of(scores: dict[str, float], at_least: float | None) -> str | None:
    if not scores or not all(math.isfinite(value) for value in scores.values()):
        return None
    if at_least is None:
        if len(scores) == 1:
            raise ValueError("this judge gives one number; say from where on it is good (at_least)")
        return min(scores, key=lambda label: (-scores[label], label))
    if "score" not in scores:
        raise ValueError(f"at_least needs a judge of one number, not of {sorted(scores)}")
    return "good" if scores["score"] >= at_least else "bad"


def _kappa(judged: Judged) -> float:
    """(agreement - chance) / (1 - chance), from the counts of labels and of answers."""
    labels, answers = judged.labels, judged.answers
    total = judged.num_examples
    chance = sum(labels[name] * answers[name] for name in labels) / total**2
    return 1.0 if chance >= 1 else (judged.accuracy - chance) / (1 - chance)


def _write(path: Path, rows: Iterable[dict[str, Any]], indent: int | None = None) -> None:
    """Write rows as JSON, the file whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False, indent=indent) + "\n")
    os.replace(aside, path)
