"""`import_hf`: a published model's folder becomes a run folder like any other, at step 0.

All is checked before anything is written. The tensors pass one by one, in the dtype they have
(dequantised ones in bf16); the files that go along are kept under `hf/`.
"""

import json
import math
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

import moebius
from moebius import checkpoint
from moebius.checkpoint.hf import Family, Imported
from moebius.checkpoint.hf.assemble import ours, watched
from moebius.checkpoint.hf.folder import HFFolder, open_folder
from moebius.checkpoint.hf.matching import (
    check_layout,
    check_sizes,
    choose,
    family_named,
    family_of,
    read_config,
)
from moebius.checkpoint.hf.place import check_new, written_aside
from moebius.checkpoint.hf.quantised import dequantised
from moebius.checkpoint.hf.special_tokens import TOKENIZER, document_token, end_tokens
from moebius.checkpoint.tensors import Lazy
from moebius.config import spec_of, to_json
from moebius.model.count import count_config

Say = Callable[[str], None]

# Where the originals of an imported model's files are kept.
KEPT: Final = "hf"
# What a fine-tuning starts from; any of it may be changed while the run stands at step 0.
STEPS, BATCH, LONGEST = 1000, 8, 2048
_ROLES = ("embedding", "head", "matrix", "expert", "router", "norm", "bias", "scalar")
_UNDECAYED = ("embedding", "norm", "bias", "scalar")


def import_hf(source: Path, out: Path, *, family: str | None = None, say: Say) -> Path:
    """Turn a local HF folder into the run folder `out`, which is new or empty; its path.

    `family` names one, `file.py:Class` for one of your own; None goes by the config. Raises
    ValueError, nothing written, for what cannot be read exactly: see the families.
    """
    out = check_new(Path(out))
    folder = open_folder(Path(source))
    of = family_of(folder.config) if family is None else family_named(family)
    check_sizes(folder.config, folder.tensors)
    imported, block = read_config(of, folder.config)
    layouts = of.layouts(imported.model, imported.vocab, None)
    for layout in layouts:
        check_layout(layout, imported.model, imported.vocab)
    sources = dequantised(folder.tensors, block)
    choice = choose(layouts, sources)
    odd = Counter[str]()
    made = watched(ours(choice.layout, sources), odd)
    tensors = {f"model.{name}": x for name, x in made.items()}
    ends, document, missing = end_tokens(folder.path), *_document(folder)
    say(f"{of.model_type}: {len(sources)} tensors, {_numbers(sources)}")
    for reason, number in choice.dropped.items():
        say(f"left out {number} tensor(s): {reason}")
    if missing:
        say(missing)
    with written_aside(out) as aside:
        (aside / KEPT).mkdir()
        for file in folder.side_files():
            shutil.copyfile(file, aside / KEPT / file.name)
        if (folder.path / TOKENIZER).is_file():
            shutil.copyfile(folder.path / TOKENIZER, aside / TOKENIZER)
        precision = _precision(tensors)
        checkpoint.save(aside / "checkpoints", 0, tensors, _state(precision), keep=1)
        record = {
            **_described(out.name, imported, folder, precision),
            "run": _run(out.name, imported, folder),
            "imported": {
                "family": spec_of(type(of), Family.TABLE),
                "source": folder.path.resolve().name,
                "dropped": dict(choice.dropped),
                # What the run's own tokenizer.json opens documents with, and where texts end.
                "document": document,
                "eos": ends,
            },
        }
        (aside / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name, count in odd.items():
        say(f"{name} holds {count:,} number(s) that are NaN or infinite; fetch the files again")
    return out


def _numbers(sources: Any) -> str:
    return f"{sum(math.prod(x.shape) for x in sources.values()):,} numbers"


def _document(folder: HFFolder) -> tuple[str | None, str]:
    """The token that opens a document, and what is missing for text."""
    if not (folder.path / TOKENIZER).is_file():
        return None, f"there is no {TOKENIZER}: the model takes token ids, but no text"
    found = document_token(folder.path)
    none = "the tokenizer's files name no token that begins or ends a text: no text can be read"
    return found, none if found is None else ""


def _precision(tensors: dict[str, Lazy]) -> str:
    """What to compute in: the widest that the matrices are stored in, half ones as bf16."""
    widest = max(x.dtype.itemsize for x in tensors.values() if len(x.shape) > 1)
    return {2: "bf16", 4: "fp32", 8: "fp64"}[widest]


def _state(precision: str) -> dict[str, Any]:
    """The state of a checkpoint that holds weights only: no moments, no random state."""
    counters = {"step": 0, "tokens": 0, "seconds": 0.0, "skipped": 0, "bad_in_a_row": 0}
    return {**counters, "weights_only": True, "data": None, "precision": precision}


def _described(name: str, imported: Imported, folder: HFFolder, precision: str) -> dict[str, Any]:
    """What run.json says beside the recipe, as a training session writes it."""
    counts = count_config(imported.model, imported.vocab, _length(folder))
    return {
        "name": name,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "versions": {
            "moebius": moebius.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{platform.system()} {platform.machine()}",
        "commit": None,
        "command": sys.argv,
        "data": {"digest": None, "folder": None},
        "params_total": counts.total,
        "params_active_min": counts.active_min,
        "params_active_mean": counts.active_mean,
        "params_active_max": counts.active_max,
        "flops_per_token": counts.flops_train,
    }


def _length(folder: HFFolder) -> int:
    """The sequences of the recipe: as long as the model takes, within reason."""
    longest = folder.config.get("max_position_embeddings")
    return min(longest, LONGEST) if isinstance(longest, int) and longest > 0 else LONGEST


def _run(name: str, imported: Imported, folder: HFFolder) -> dict[str, Any]:
    """The JSON of a recipe that fine-tunes the model on this machine's Python library."""
    roles = {
        role: {"rule": {"use": "adamw"}, "weight_decay": 0.0 if role in _UNDECAYED else 1.0}
        for role in _ROLES
    }
    return {
        "name": name,
        "model": to_json(imported.model),
        "data": {"path": "python:stdlib"},
        "optim": {"lr": 1e-5, "schedule": {"use": "constant"}, "roles": roles},
        "steps": STEPS,
        "batch": BATCH,
        "sequence_length": _length(folder),
        "vocab": imported.vocab,
    }
