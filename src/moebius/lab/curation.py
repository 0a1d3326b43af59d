"""What is each step of a curation worth? The same small MoE on the corpus without it, in bits.

For every arm the curation runs with one step left out (one arm with all, one with none), a model is
trained on what is kept, for equal tokens and several seeds, and read on clean validation texts that
are in no corpus. Arms of one seed share initial weights, so differences are paired. All arms share
one tokenizer, trained on what the whole curation keeps.
"""

import dataclasses
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moebius.checkpoint.files import replace_file
from moebius.curate.config import Curation
from moebius.curate.document import Document
from moebius.curate.pipeline import curate
from moebius.curate.plan import step_name
from moebius.curate.shards import read_documents
from moebius.curate.steps.extract import Extract
from moebius.data.config import DataConfig
from moebius.data.tokenizer import train_tokenizer
from moebius.lab.dirt import texts_of
from moebius.lab.interval import interval
from moebius.lab.loss_scorer import LossScorer
from moebius.lab.trained import UNJUDGED, train_in
from moebius.model.block.prenorm import PreNorm
from moebius.model.ffn.moe import MoE
from moebius.model.lm import ModelConfig
from moebius.model.mixers.gqa import GQA
from moebius.monitor.runs import read_json
from moebius.optim.optimizer import OptimConfig
from moebius.optim.roles import default_roles
from moebius.optim.schedules.wsd import WSD
from moebius.train.run import Run
from moebius.train.session import Progress, Say

# Bytes of each validation text that are read.
VALIDATION_BYTES = 256 << 10


def small() -> Run:
    """Two layers of width 128 with 16 experts: the model that judges corpora, a minute on a CPU."""
    layer = PreNorm(
        GQA(heads=4, kv_heads=2, head_width=32), MoE(experts=16, top_k=2, expert_width=128)
    )
    return Run(
        name="judge",
        model=ModelConfig(width=128, layers=2 * (layer,)),
        data=DataConfig(path="-"),
        optim=OptimConfig(
            lr=0.005, schedule=WSD(warmup="5%", decay="40%"), roles=default_roles(), clip=1.0
        ),
        steps=400,
        batch=8,
        sequence_length=256,
        vocab=2048,
        evaluation=UNJUDGED,
    )


@dataclasses.dataclass(frozen=True)
class Ablation:
    """The model, the clean texts it is read on (name -> file or folder), and how many seeds."""

    run: Run
    validation: Mapping[str, Path]
    seeds: int = 3

    def __post_init__(self) -> None:
        if self.seeds < 1 or not self.validation:
            raise ValueError("an ablation needs at least one seed and one validation text")


def arms_of(curation: Curation) -> dict[str, Curation]:
    """With all steps, without each, and with none but extraction, which makes the text."""
    fixed = [step for step in curation.steps if isinstance(step, Extract)]
    arms = {"all": curation}
    for i, step in enumerate(curation.steps):
        if step not in fixed:
            left = curation.steps[:i] + curation.steps[i + 1 :]
            arms[step_name(curation, i)] = dataclasses.replace(curation, steps=left)
    return {**arms, "none": dataclasses.replace(curation, steps=tuple(fixed))}


def curation_experiment(
    curation: Curation,
    ablation: Ablation,
    out: Path,
    *,
    say: Say = print,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run every arm in `out`, or go on where that was stopped; `ablation.json` there.

    Raises ValueError where the curation, a validation text or the model cannot work.
    """
    out = out.absolute()
    texts = {name: _read(place) for name, place in ablation.validation.items()}
    rows = []
    tokenizer = out / "tokenizer.json"
    for name, arm in arms_of(dataclasses.replace(curation, mix=None)).items():
        place = curate(arm, out / name / "corpus", progress)
        if not tokenizer.exists():
            kept = (d.text for p in _parts(place) for d in read_documents(p))
            model = train_tokenizer(kept, ablation.run.vocab)
            replace_file(tokenizer, [model.to_json().encode()])
        row = _arm(name, place, tokenizer, ablation, texts, out, progress)
        rows.append(row)
        say(f"{name}: {row['documents']} documents, {row['bits_per_byte']}")
    result = _result(curation, ablation, rows)
    replace_file(out / "ablation.json", [(json.dumps(result, indent=2) + "\n").encode()])
    return result


def _parts(place: Path) -> list[Path]:
    return sorted((place / "documents").rglob("*.parquet"))


def _read(place: Path) -> list[str]:
    """The first texts of a place, up to VALIDATION_BYTES."""
    texts: list[str] = []
    left = VALIDATION_BYTES
    for text in texts_of(place):
        texts.append(text[:left])
        left -= len(texts[-1])
        if left <= 0:
            break
    return texts


def _arm(
    name: str,
    place: Path,
    tokenizer: Path,
    ablation: Ablation,
    texts: Mapping[str, Sequence[str]],
    out: Path,
    progress: Progress | None,
) -> dict[str, Any]:
    counts = read_json(place / "counts.json")
    found: dict[str, list[float]] = {title: [] for title in texts}
    for seed in range(ablation.run.seed, ablation.run.seed + ablation.seeds):
        folder = out / name / f"seed-{seed}"
        # A run that has begun names its own copy of the tokenizer.
        own = folder / "tokenizer.json"
        same = own.exists() and own.read_bytes() == tokenizer.read_bytes()
        data = dataclasses.replace(
            ablation.run.data,
            path=str(place / "documents"),
            tokenizer=str(own if same else tokenizer),
        )
        run = dataclasses.replace(ablation.run, data=data, seed=seed)
        train_in(run, folder, progress)
        scores = LossScorer(run=str(folder), max_chars=VALIDATION_BYTES).build()
        for title, parts in texts.items():
            bits = [score["score"] for score in scores.score(parts)]
            sizes = [len(part.encode()) for part in parts]
            total = math.fsum(b * n for b, n in zip(bits, sizes, strict=True))
            found[title].append(total / sum(sizes))
    kinds = Counter(_kind(d) for p in _parts(place) for d in read_documents(p))
    return {
        "arm": name,
        "documents": counts["kept"]["documents"],
        "bytes": counts["kept"]["bytes"],
        "kinds": dict(sorted(kinds.items())),
        "bits_per_byte": {title: statistics.fmean(values) for title, values in found.items()},
        "by_seed": found,
    }


def _kind(document: Document) -> str:
    """What `moebius lab dirt` said of a page in its id, `near-17`; other documents have no kind."""
    kind, dash, number = document.labels.get("id", "").rpartition("-")
    return kind if dash and number.isdigit() else "document"


def _result(
    curation: Curation, ablation: Ablation, rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The rows, each with what it loses against all steps, paired by seed."""
    whole = rows[0]
    for row in rows:
        row["loses"] = {
            title: _costs([a - b for a, b in zip(row["by_seed"][title], values, strict=True)])
            for title, values in whole["by_seed"].items()
        }
    tokens = ablation.run.steps * ablation.run.tokens_per_step()
    return {
        "curation": curation.name,
        "run": ablation.run.name,
        "tokens": tokens,
        "seeds": ablation.seeds,
        "arms": list(rows),
    }


def _costs(differences: Sequence[float]) -> dict[str, float | None]:
    return dict(zip(("mean", "low", "high"), interval(differences), strict=True))


def table(result: Mapping[str, Any]) -> str:
    """The result as a markdown table: a step pays where leaving it out costs bits for certain."""
    titles = list(result["arms"][0]["bits_per_byte"])
    head = ["left out", "documents kept", *(f"{t}: bits/byte" for t in titles)]
    lines = [f"| {' | '.join([*head, *(f'{t}: costs' for t in titles), 'pays'])} |"]
    lines.append(f"|{' --- |' * (len(head) + len(titles) + 1)}")
    for row in result["arms"]:
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in row["kinds"].items())
        left = {"all": "nothing", "none": "every step"}.get(row["arm"], row["arm"])
        cells = [left, f"{row['documents']:,} ({kinds})"]
        cells += [f"{row['bits_per_byte'][title]:.4f}" for title in titles]
        cells += [_says(row["loses"][title]) for title in titles]
        lines.append(f"| {' | '.join([*cells, _pays(row)])} |")
    return "\n".join(lines)


def _says(found: Mapping[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['mean']:+.4f}"
    return f"{found['mean']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def _pays(row: Mapping[str, Any]) -> str:
    if row["arm"] == "all":
        return ""
    found = list(row["loses"].values())
    if not any(any(each.values()) for each in found):
        return "the same documents are kept"
    if any(each["low"] is None for each in found):
        return "one seed says nothing"
    if all(each["low"] > 0 for each in found):
        return "yes"
    return "no: it costs" if all(each["high"] < 0 for each in found) else "undecided"
