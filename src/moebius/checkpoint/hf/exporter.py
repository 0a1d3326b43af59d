"""`export_hf`: a run's newest intact checkpoint as a folder that others load without our code.

The map is exact or the export is refused. An imported run keeps what its folder said: the config is
the original one, but for `quantization_config` and `auto_map` (weights are plain and no code goes
along), the dtype if it is changed, and what another target than transformers needs.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch

from moebius import checkpoint
from moebius.checkpoint.files import write_file
from moebius.checkpoint.hf import Family, Imported, Target, Wanted
from moebius.checkpoint.hf.assemble import theirs, watched
from moebius.checkpoint.hf.folder import CONFIG, INDEX, read_object, side_files
from moebius.checkpoint.hf.importer import KEPT
from moebius.checkpoint.hf.keys import HARMLESS
from moebius.checkpoint.hf.layout import Layout
from moebius.checkpoint.hf.matching import check_layout, family_named, read_config, theirs_of
from moebius.checkpoint.hf.place import check_new, written_aside
from moebius.checkpoint.hf.refusals import Unfit
from moebius.checkpoint.hf.special_tokens import TOKENIZER, token_id, with_document_first
from moebius.checkpoint.stored import Readable, stored_tensors
from moebius.checkpoint.tensors import Lazy, TensorFile, grouped
from moebius.config import kept_file, map_user_files, nearest, spec_of
from moebius.model.longer import effective_length, effective_model

Say = Callable[[str], None]

SHARD_BYTES: Final = 5_000_000_000
DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DOCUMENT: Final = "<|document|>"


@final
@dataclass(frozen=True)
class _Source:
    """A run as it is exported: its model, its tensors unread, and what it was imported from."""

    folder: Path
    model: Imported
    tensors: Mapping[str, Readable]
    original: dict[str, Any]
    # The family it was imported as, and whether its weights are still those that came.
    family: str | None
    untouched: bool
    context: int
    document: str


def export_hf(
    run: Path,
    out: Path,
    *,
    target: Target = "transformers",
    dtype: str | None = None,
    family: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    say: Say,
) -> Path:
    """Write the model of a run as the HF folder `out`, which is new or empty; its path.

    `dtype` is fp32, bf16 or fp16; None leaves each tensor as it is stored. `family` names one
    (None: the one it came from, else the first that holds it). Raises ValueError, nothing written,
    where no family holds the model: the line lists why.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"{dtype!r} is no dtype to export{nearest(dtype, DTYPES)}")
    out = check_new(Path(out))
    source = _open(Path(run), say)
    of, written = _family(source, target, family)
    (layout,) = of.layouts(source.model.model, source.model.vocab, target)
    check_layout(layout, source.model.model, source.model.vocab)
    dtypes = _dtypes(layout, source.tensors, None if dtype is None else DTYPES[dtype])
    _check_stored(layout, source)
    odd = Counter[str]()
    tensors = watched(theirs(layout, source.tensors, dtypes), odd)
    for entry in layout.entries:
        if not entry.pieces:
            say(f"left out {entry.ours}: {entry.why}")
    config = _config(source, of, written, target)
    if dtype is not None or not source.untouched:
        _set_dtype(config, tensors)
    with written_aside(out) as aside:
        shards = _write_tensors(aside, tensors, shard_bytes)
        for name, count in odd.items():
            text = f"{name} holds {count:,} number(s) that are NaN or infinite"
            if dtype is not None:
                raise ValueError(f"in {dtype}, {text}; leave out --dtype, or take one it fits in")
            say(text)
        _write_text(aside, source, config)
    say(f"{of.model_type} for {target}: {len(tensors)} tensors in {shards} file(s)")
    return out


def _open(folder: Path, say: Say) -> _Source:
    if not (folder / "run.json").is_file():
        raise ValueError(f"there is no run in {folder} (no run.json); `moebius runs` lists them")
    record = read_object(folder / "run.json")
    recipe = map_user_files(record["run"], lambda file: kept_file(folder / file))
    path = checkpoint.latest_intact(folder / "checkpoints", say=say)
    if path is None:
        raise ValueError(f"{folder} has no checkpoint yet; wait for its first, or train it on")
    stored, state = stored_tensors(path)
    weights = {k.removeprefix("model."): x for k, x in stored.items() if k.startswith("model.")}
    original = read_object(folder / KEPT / CONFIG) if (folder / KEPT / CONFIG).is_file() else {}
    tokens = state["tokens"]
    context = original.get("max_position_embeddings") or effective_length(recipe, tokens)
    if tokens:
        context = max(context, effective_length(recipe, tokens))
    imported = record.get("imported", {})
    document = recipe["data"].get("document") or imported.get("document") or _DOCUMENT
    kind, untouched = imported.get("family"), bool(state.get("weights_only"))
    model = Imported(effective_model(recipe, tokens), recipe["vocab"])
    return _Source(folder, model, weights, original, kind, untouched, context, document)


def _check_stored(layout: Layout, source: _Source) -> None:
    """ValueError where the checkpoint's tensors are not those of the model in run.json."""
    for entry in layout.entries:
        found = source.tensors.get(entry.ours)
        if found is None or found.shape != entry.shape:
            raise ValueError(
                f"{source.folder / 'run.json'} is not of this checkpoint: {entry.ours} does not "
                "fit; restore it from a copy"
            )


def _family(source: _Source, target: Target, only: str | None) -> tuple[Family, dict[str, Any]]:
    """The family that holds a model, and the config it writes of it."""
    own = [source.family] if source.family else []
    reasons: list[str] = []
    for name in dict.fromkeys([only] if only else [*own, *Family.TABLE]):
        found, wanted = family_named(name), Wanted(target, source.context)
        try:
            return found, found.write_config(source.model.model, source.model.vocab, wanted)
        except Unfit as error:
            reasons.append(str(error))
    raise ValueError(f"no HF family can hold this model; {' | '.join(reasons)}")


def _dtypes(
    layout: Layout, tensors: Mapping[str, Readable], wanted: torch.dtype | None
) -> dict[str, torch.dtype]:
    dtypes: dict[str, torch.dtype] = {}
    for name, pieces in theirs_of(layout).items():
        exact = any(re.fullmatch(pattern, name) for pattern in layout.exact)
        stored = tensors[pieces[0][0].ours].dtype
        dtypes[name] = stored if wanted is None or exact else wanted
    return dtypes


def _config(
    source: _Source, of: Family, written: Mapping[str, Any], target: Target
) -> dict[str, Any]:
    original = source.original
    same = original and source.family == spec_of(type(of), Family.TABLE)
    if same and read_config(of, original)[0] == source.model:
        own = {key: written[key] for key in of.explicit}
        config = {**original, **(own if target == "transformers" else written)}
        if "max_position_embeddings" in original:
            config["max_position_embeddings"] = source.context
    else:
        kept = {key: x for key, x in original.items() if key in HARMLESS | of.harmless}
        config = {**kept, **written}
    for name in ("quantization_config", "auto_map"):
        config.pop(name, None)
    config |= {"model_type": of.model_type, "architectures": [of.architecture]}
    if not original:
        document = _document_id(source)
        config |= {"bos_token_id": document, "eos_token_id": document}
    return config


def _set_dtype(config: dict[str, Any], tensors: Mapping[str, Lazy]) -> None:
    """Say the dtype that most numbers have, under the key the config has for it."""
    named = [key for key in ("dtype", "torch_dtype") if key in config]
    sizes: Counter[str] = Counter()
    for x in tensors.values():
        sizes[str(x.dtype).removeprefix("torch.")] += x.nbytes
    config |= dict.fromkeys(named or ["dtype"], sizes.most_common(1)[0][0])


def _write_tensors(folder: Path, tensors: Mapping[str, Lazy], limit: int) -> int:
    groups = grouped(tensors, limit)
    count = len(groups)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = ["model.safetensors"] if count == 1 else names
    for name, group in zip(names, groups, strict=True):
        # Loaders refuse files that do not say which framework wrote them.
        write_file(folder / name, TensorFile(name, group, {"format": "pt"}).chunks())
    if count > 1:
        pairs = zip(names, groups, strict=True)
        placed = {tensor: name for name, group in pairs for tensor in group}
        total = sum(x.nbytes for x in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        _write_json(folder / INDEX, index)
    return count


def _write_text(folder: Path, source: _Source, config: Mapping[str, Any]) -> None:
    """The config, and the files of the tokenizer and of generation."""
    _write_json(folder / CONFIG, config)
    if source.original:
        for file in side_files(source.folder / KEPT):
            if file.name != CONFIG:
                shutil.copyfile(file, folder / file.name)
        return
    document = _document_id(source)
    tokenizer = read_object(source.folder / TOKENIZER)
    _write_json(folder / TOKENIZER, with_document_first(tokenizer, source.document))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": source.document,
        "eos_token": source.document,
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.context,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    ends = {"bos_token_id": document, "eos_token_id": document}
    _write_json(folder / "generation_config.json", ends)


def _document_id(source: _Source) -> int:
    found = token_id(read_object(source.folder / TOKENIZER), source.document)
    if found is None:
        raise ValueError(f"the run's {TOKENIZER} has no token {source.document}; restore the file")
    return found


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_file(path, [(json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()])
