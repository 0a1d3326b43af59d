"""Choosing a family for a config or a model, and a layout for a folder; every misfit by name."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from moebius.checkpoint.hf import Family, Imported
from moebius.checkpoint.hf.keys import HARMLESS, Keys
from moebius.checkpoint.hf.layout import Entry, Layout, Piece
from moebius.checkpoint.hf.quantised import read_quantisation
from moebius.checkpoint.stored import Readable
from moebius.config import nearest, variant_class
from moebius.model.lm import ModelConfig
from moebius.model.longer import rope_bases


def family_named(name: str) -> Family:
    """The family of a table entry, or of `file.py:Class`."""
    cls = variant_class(Family, name)
    assert issubclass(cls, Family)
    return cls()


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config.json is of, by its model type, else by its architecture."""
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if isinstance(kind, str) and kind in Family.TABLE:
        return family_named(kind)
    if kind is None and isinstance(architectures, list):
        for name in Family.TABLE:
            found = family_named(name)
            if found.architecture in architectures:
                return found
    if config.get("auto_map"):
        raise ValueError(
            f"model_type {kind!r} is code of its own (auto_map), which is never run here; known: "
            f"{', '.join(Family.TABLE)}"
        )
    raise ValueError(f"unknown model_type {kind!r}{nearest(str(kind), Family.TABLE)}")


def read_config(of: Family, config: Mapping[str, Any]) -> tuple[Imported, tuple[int, int]]:
    """The model of a config.json, every key accounted for, and the block of FP8 weights."""
    keys = Keys(config)
    block = read_quantisation(keys)
    for name in ("is_encoder_decoder", "is_decoder", "add_cross_attention", "tie_encoder_decoder"):
        keys.must(name, False, None, why="only decoders of one stream are read")
    keys.must("cross_attention_hidden_size", None, why="there is no cross-attention")
    if config.get("num_attention_heads") == 0:
        raise ValueError("config.json: num_attention_heads must be at least 1, not 0")
    imported = of.read_config(keys)
    keys.finish(HARMLESS | of.harmless)
    if imported.model.norm_eps < 0:
        raise ValueError(f"config.json: a norm's epsilon cannot be {imported.model.norm_eps}")
    for base in rope_bases(imported.model):
        if base <= 0:
            raise ValueError(f"config.json: rope_theta must be above 0, not {base}")
    return imported, block


def check_sizes(config: Mapping[str, Any], tensors: Mapping[str, Readable]) -> None:
    """ValueError where a config counts more layers or experts than can lie in the tensors, before
    a model of that size is laid out.
    """
    numbers = 2 * sum(math.prod(x.shape) for x in tensors.values())  # a byte may hold two
    for name, value in config.items():
        most = len(tensors) if re.fullmatch(r"num_(hidden_)?layers", name) else numbers
        if re.search("layers|experts", name) and type(value) is int and value > most:
            raise ValueError(
                f"config.json: {name} is {value:,}, more than the folder's {len(tensors):,} "
                "tensors can hold; fetch the files that belong together"
            )


def state_shapes(model: ModelConfig, vocab: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of all that `LM.state_dict()` holds, built without memory."""
    with torch.device("meta"):
        state = model.build(vocab).state_dict()
    return {name: tuple(x.shape) for name, x in state.items()}


def check_layout(layout: Layout, model: ModelConfig, vocab: int) -> None:
    """Assert that a family's map is of this model, to the last tensor and number."""
    own = state_shapes(model, vocab)
    mapped = {entry.ours: entry.shape for entry in layout.entries}
    odd = sorted(name for name in own.keys() | mapped.keys() if own.get(name) != mapped.get(name))
    assert not odd, f"the map does not fit the model at {', '.join(odd[:5])}"
    assert len(mapped) == len(layout.entries), "a tensor is mapped twice"
    for entry in layout.entries:
        full = math.prod(entry.shape) == entry.covered
        assert full or entry.fill is not None, f"{entry.ours} is not covered by its pieces"
        assert entry.pieces or entry.why, f"{entry.ours} is left out without a reason"
    theirs_of(layout)


def theirs_of(layout: Layout) -> dict[str, list[tuple[Entry, Piece]]]:
    """By name of theirs, the pieces that make it up; of equal parts (tied), the first."""
    found: dict[str, list[tuple[Entry, Piece]]] = {}
    for entry in layout.entries:
        for piece in entry.pieces:
            made = found.setdefault(piece.theirs, [])
            assert all(other.shape == piece.shape for _, other in made), piece.theirs
            if all(other.part != piece.part for _, other in made):
                made.append((entry, piece))
    return found


@final
@dataclass(frozen=True)
class Choice:
    """A layout that fits a folder, and what of the folder it leaves out: reason -> tensors."""

    layout: Layout
    dropped: Mapping[str, int]


def choose(layouts: Iterable[Layout], tensors: Mapping[str, Readable]) -> Choice:
    """The first layout that fits; else a ValueError of what the nearest one misses."""
    misfits = []
    for layout in layouts:
        found = _misfits(layout, tensors)
        if not found.count:
            return Choice(layout, _dropped(layout, tensors))
        misfits.append(found)
    raise ValueError(min(misfits, key=lambda found: found.count).say())


@final
@dataclass(frozen=True)
class _Misfits:
    missing: list[str]
    unfit: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    extra: list[str]

    @property
    def count(self) -> int:
        return len(self.missing) + len(self.unfit) + len(self.extra)

    def say(self) -> str:
        """The most telling of them: missing (or renamed), then shapes, then extra tensors."""
        if self.missing:
            like = difflib.get_close_matches(self.missing[0], self.extra, n=1, cutoff=0.5)
            hint = f"; did you mean {like[0]!r}?" if like else ""
            first = f"the folder lacks {self.missing[0]}{hint}"
        elif self.unfit:
            name, found, due = self.unfit[0]
            first = f"{name} has shape {list(found)}, but config.json makes it {list(due)}"
        else:
            first = f"{self.extra[0]} is not a tensor of such a model"
        more = f" (and {self.count - 1} more do not fit)" if self.count > 1 else ""
        return f"{first}{more}; nothing was imported"


def _misfits(layout: Layout, tensors: Mapping[str, Readable]) -> _Misfits:
    wanted = {name: pieces[0][1].shape for name, pieces in theirs_of(layout).items()}
    patterns = [re.compile(pattern) for pattern, _ in layout.dropped]
    both = sorted(wanted.keys() & tensors.keys())
    odd = sorted(tensors.keys() - wanted.keys())
    return _Misfits(
        missing=sorted(wanted.keys() - tensors.keys()),
        unfit=[(x, tensors[x].shape, wanted[x]) for x in both if tensors[x].shape != wanted[x]],
        extra=[name for name in odd if not any(p.fullmatch(name) for p in patterns)],
    )


def _dropped(layout: Layout, tensors: Mapping[str, Readable]) -> dict[str, int]:
    wanted = theirs_of(layout)
    counts: dict[str, int] = {}
    for name in sorted(tensors):
        reason = next((why for pattern, why in layout.dropped if re.fullmatch(pattern, name)), "")
        pieces = wanted.get(name, [])
        used = sum(math.prod(piece.part_shape) for _, piece in pieces)
        if used < math.prod(tensors[name].shape) or not pieces:
            assert reason, f"{name} is used in part only, and no reason is given"
            counts[reason] = counts.get(reason, 0) + 1
    return counts
