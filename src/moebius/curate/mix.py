"""The mix: kept documents in groups, and how much of each group a run reads in each of its stages.

A group is a choice by source, kind, language, label, score and length; a document belongs to the
first that takes it. Stages follow Llama 3 (shares by class, 2407.21783 3.1.2), LongCat-Flash (a
stage of 70% STEM and code, 2509.01322 3) and Hunyuan-Large (annealing on the last 5%, then 25% of
long documents, 2411.02265 3). `curate/mixed.py` turns a mix into what the trainer reads.
"""

import math
import re
from dataclasses import dataclass

from moebius.config import nearest
from moebius.curate.document import Document, Kind

# Of documents that no group takes; they are counted and kept apart, and no run reads them.
UNMATCHED = "unmatched"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Group:
    """Documents that are mixed as one. What is left empty is not asked; all else must hold.

    Of several labels with one name any may hold. `min_bytes` (UTF-8) makes a group of long
    documents. `weight` counts in a mix without stages; `max_epochs` over all stages together.
    """

    name: str
    sources: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()
    languages: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    min_scores: tuple[tuple[str, float], ...] = ()
    min_bytes: int = 0
    weight: float = 1.0
    max_epochs: float | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name == UNMATCHED:
            raise ValueError(
                f"group {self.name!r} names a folder: write a-z, 0-9, - and _, not {UNMATCHED!r}"
            )
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight of group {self.name} must be above 0, not {self.weight}")
        if self.max_epochs is not None and not 0 < self.max_epochs < math.inf:
            raise ValueError(
                f"max_epochs of group {self.name} must be above 0, not {self.max_epochs}"
            )
        if self.min_bytes < 0:
            raise ValueError(f"min_bytes of group {self.name} must not be below 0")

    @property
    def takes_all(self) -> bool:
        """Whether nothing is asked of a document."""
        asked = (self.sources, self.kinds, self.languages, self.labels, self.min_scores)
        return not (any(asked) or self.min_bytes)

    def takes(self, document: Document) -> bool:
        """Whether a document belongs to the group, if to none before it."""
        wanted: dict[str, set[str]] = {}
        for name, value in self.labels:
            wanted.setdefault(name, set()).add(value)
        return (
            (not self.sources or document.source in self.sources)
            and (not self.kinds or document.kind in self.kinds)
            and (not self.languages or document.language in self.languages)
            and all(document.labels.get(name) in values for name, values in wanted.items())
            and all(document.scores.get(name, -math.inf) >= x for name, x in self.min_scores)
            and (not self.min_bytes or document.num_bytes >= self.min_bytes)
        )


@dataclass(frozen=True)
class MixStage:
    """A part of a run's tokens with shares of its own: (group, share) pairs that sum to 1.

    Groups left out give nothing. Without a `sequence_length` or `rope_base` the run's stays.
    """

    name: str
    weights: tuple[tuple[str, float], ...]
    share_of_tokens: float = 1.0
    sequence_length: int | None = None
    rope_base: float | None = None

    def __post_init__(self) -> None:
        names = [name for name, _ in self.weights]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"stage {self.name} names group {twice[0]!r} twice")
        for name, share in self.weights:
            if not 0 <= share <= 1:
                raise ValueError(
                    f"share of {name} in stage {self.name} must be in 0..1, not {share}"
                )
        total = math.fsum(share for _, share in self.weights)
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"the shares of stage {self.name} sum to {total:.6g}, not 1: "
                + ", ".join(f"{name} {share:g}" for name, share in self.weights)
            )
        if not 0 < self.share_of_tokens <= 1:
            raise ValueError(
                f"share_of_tokens of stage {self.name} must be above 0 and at most 1, "
                f"not {self.share_of_tokens}"
            )


@dataclass(frozen=True)
class Mix:
    """Groups, the first that takes a document having it, and the stages of the run.

    Without stages there is one, with shares by the groups' weights. A last group that asks for
    nothing takes the rest; without it the rest is `unmatched`.
    """

    groups: tuple[Group, ...] = (Group("other"),)
    stages: tuple[MixStage, ...] = ()

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        if not names:
            raise ValueError("a mix needs a group; one that asks for nothing takes every document")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"there are two groups {twice[0]!r} in the mix")
        for group in self.groups[:-1]:
            if group.takes_all:
                raise ValueError(
                    f"group {group.name} asks for nothing and takes every document; put it last"
                )
        stages = [stage.name for stage in self.stages]
        if twice := sorted({name for name in stages if stages.count(name) > 1}):
            raise ValueError(f"there are two stages {twice[0]!r} in the mix")
        for stage in self.stages:
            for name, _ in stage.weights:
                if name not in names:
                    raise ValueError(
                        f"stage {stage.name} gives a share to {name!r}, which is no group"
                        f"{nearest(name, names)}"
                    )
        total = math.fsum(stage.share_of_tokens for stage in self.stages)
        if self.stages and abs(total - 1) > 1e-6:
            raise ValueError(f"share_of_tokens of the stages sums to {total:.6g}, not 1")

    def laid_out(self) -> tuple[MixStage, ...]:
        """The stages; without any, the one that the groups' weights make."""
        if self.stages:
            return self.stages
        total = math.fsum(group.weight for group in self.groups)
        return (MixStage("all", tuple((g.name, g.weight / total) for g in self.groups)),)


def group_of(mix: Mix, document: Document) -> str:
    """The name of the document's group, `unmatched` where none takes it."""
    return next((group.name for group in mix.groups if group.takes(document)), UNMATCHED)


def four_stages(
    long_bytes: int = 128 << 10, long_sequence: int | None = None, rope_base: float | None = None
) -> Mix:
    """Pretraining, a stage of 70% STEM and code, annealing, and long context, over five groups."""
    # As the step `detect` labels pages.
    stem = (("content", "code"), ("content", "reasoning"))
    groups = (
        Group("long", kinds=("prose", "code"), min_bytes=long_bytes, max_epochs=4.0),
        Group("code", kinds=("code",), max_epochs=4.0),
        Group("stem", labels=stem, max_epochs=4.0),
        Group("general", languages=("eng",), max_epochs=4.0),
        Group("multilingual", max_epochs=4.0),
    )

    def shares(long: float, code: float, stem: float, general: float, multilingual: float) -> tuple:
        names = (group.name for group in groups)
        return tuple(zip(names, (long, code, stem, general, multilingual), strict=True))

    longer = (long_sequence, rope_base)
    return Mix(
        groups,
        (
            MixStage("pretrain", shares(0.05, 0.17, 0.25, 0.45, 0.08), 0.80),
            MixStage("mid-train", shares(0.05, 0.30, 0.40, 0.20, 0.05), 0.13),
            MixStage("annealing", shares(0.05, 0.25, 0.35, 0.30, 0.05), 0.05),
            MixStage("long", shares(0.25, 0.135, 0.20, 0.35, 0.065), 0.02, *longer),
        ),
    )
