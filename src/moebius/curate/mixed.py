"""A mix as what the trainer reads: sources of grouped documents, and stages with their weights.

Shares become weights of `Source`s, stages `at_tokens` of a run; every group that any stage draws
from is a source in all of them, so that all stages share the prepared shards. How often each group
comes round is worked out before a run, with the trainer's rule: a spent group leaves and the others
share what is left.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebius.config import nearest, to_json
from moebius.curate.mix import Group, Mix, MixStage
from moebius.data.config import DataConfig, Source

# The trainer holds out a tenth of the documents.
TRAINED = 0.9


def used_groups(mix: Mix) -> list[Group]:
    """The groups that some stage draws from, in the order of the mix."""
    drawn = {name for stage in mix.laid_out() for name, share in stage.weights if share}
    return [group for group in mix.groups if group.name in drawn]


def data_config(mix: Mix, folder: Path, stage: str = "") -> DataConfig:
    """The grouped documents under a curation's folder as sources.

    With a stage, its groups with its shares; without, all groups, with their shares of the whole
    run. Raises ValueError where there is no such stage, or a group has no documents.
    """
    stages = mix.laid_out()
    if stage:
        names = [item.name for item in stages]
        if stage not in names:
            raise ValueError(f"the mix has no stage {stage!r}{nearest(stage, names)}")
        stages = tuple(item for item in stages if item.name == stage)
    whole = math.fsum(item.share_of_tokens for item in stages)
    sources: list[Source] = []
    for group in used_groups(mix):
        shares = [dict(item.weights).get(group.name, 0) * item.share_of_tokens for item in stages]
        if not any(shares):
            continue
        place = folder / "documents" / group.name
        if not any(place.rglob("*.parquet")):
            raise ValueError(
                f"group {group.name} has a share in the mix and no documents in {place}; take it "
                "out of the stages, or curate documents for it"
            )
        weight = round(math.fsum(shares) / whole, 9)
        sources.append(Source(str(place), max(weight, 1e-9), group.max_epochs))
    return DataConfig(sources=tuple(sources))


@dataclass(frozen=True)
class Planned:
    """A stage of the mix in a run: where it begins, and a weight for each source of the data."""

    stage: MixStage
    at_tokens: int
    tokens: int
    weights: tuple[float, ...]


def plan(mix: Mix, tokens: int, step_tokens: int) -> list[Planned]:
    """The stages of a run of so many tokens, each beginning after a whole number of steps."""
    steps = tokens // step_tokens
    names = [group.name for group in used_groups(mix)]
    begins, before = [], 0.0
    for stage in mix.laid_out():
        begins.append(round(before * steps))
        before += stage.share_of_tokens
    planned: list[Planned] = []
    for stage, begin, end in zip(mix.laid_out(), begins, [*begins[1:], steps], strict=True):
        if begin >= end:
            raise ValueError(
                f"stage {stage.name} has {stage.share_of_tokens:.3g} of {steps} steps, which is "
                f"none; train for more steps than {tokens:,} tokens or leave it out"
            )
        weights = tuple(float(dict(stage.weights).get(name, 0)) for name in names)
        counts = (begin * step_tokens, (end - begin) * step_tokens)
        planned.append(Planned(stage, *counts, weights))
    return planned


def train_fields(
    mix: Mix, folder: Path, *, tokens: int, batch: int, sequence_length: int
) -> list[str]:
    """The overrides with which `moebius train` reads this mix: data, steps, weights and stages.

    `batch` sequences of `sequence_length` make a step; a stage with longer ones has fewer of them.
    """
    stages = plan(mix, tokens, batch * sequence_length)
    for item in stages[:1]:
        if item.stage.sequence_length or item.stage.rope_base:
            raise ValueError(
                f"stage {item.stage.name} comes first: give the run its sequence_length and base"
            )
    sources = to_json(data_config(mix, folder).sources)
    fields = {
        "data": {"sources": sources},
        "batch": batch,
        "sequence_length": sequence_length,
        "steps": tokens // (batch * sequence_length),
        "weights": list(stages[0].weights),
        "stages": _stages(stages[1:], sequence_length),
    }
    return [f"{name}={json.dumps(value)}" for name, value in fields.items()]


def _stages(stages: Sequence[Planned], length: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for item in stages:
        length = item.stage.sequence_length or length
        base = {} if item.stage.rope_base is None else {"rope_base": item.stage.rope_base}
        own = {"at_tokens": item.at_tokens, "sequence_length": length, **base}
        found.append({**own, "weights": list(item.weights)})
    return found


# --- epochs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """What one stage takes of one group. Epochs are passes over what the trainer trains on."""

    stage: str
    group: str
    share: float
    # Tokens by the share, and those it gives: fewer where its cap binds, more where another's does.
    asked: float
    given: float
    epochs: float
    # Of this stage and all before it.
    epochs_so_far: float
    max_epochs: float | None

    @property
    def binds(self) -> bool:
        """Whether the cap lets the group give less than its share."""
        return self.given < self.asked * (1 - 1e-9)

    def describe(self) -> str:
        """One line for the reader of a warning."""
        return (
            f"stage {self.stage} asks {self.share:.1%} of {self.group} and gets "
            f"{self.share * self.given / self.asked:.1%}: max_epochs={self.max_epochs:g} is reached"
        )


def check(
    mix: Mix, bytes_by_group: Mapping[str, int], tokens: int, bytes_per_token: float = 4.0
) -> list[Need]:
    """How often each stage of a run of so many tokens repeats each group, and which caps bind.

    Raises ValueError where a group with a share has no bytes, or the caps of all groups of a stage
    leave it short of tokens; the trainer would refuse that run.
    """
    groups = {group.name: group for group in used_groups(mix)}
    size: dict[str, float] = {}
    for name in groups:
        size[name] = bytes_by_group.get(name, 0) * TRAINED / bytes_per_token
        if size[name] <= 0:
            raise ValueError(f"group {name} has a share in the mix and no documents")
    used = dict.fromkeys(groups, 0.0)
    needs: list[Need] = []
    for stage in mix.laid_out():
        total = tokens * stage.share_of_tokens
        shares = {name: share for name, share in stage.weights if share}
        left = {name: _left(groups[name], size[name], used[name]) for name in shares}
        given = share_out(total, shares, left)
        if math.fsum(given.values()) < total * (1 - 1e-9):
            raise ValueError(
                f"stage {stage.name} needs {total:,.0f} tokens and its groups give "
                f"{math.fsum(given.values()):,.0f} within their max_epochs; raise max_epochs of "
                f"{', '.join(shares)} or train for fewer tokens"
            )
        for name, share in shares.items():
            used[name] += given[name]
            epochs = (given[name] / size[name], used[name] / size[name])
            cap = groups[name].max_epochs
            needs.append(Need(stage.name, name, share, total * share, given[name], *epochs, cap))
    return needs


def _left(group: Group, size: float, used: float) -> float:
    """The tokens a group may still give."""
    return math.inf if group.max_epochs is None else max(0.0, group.max_epochs * size - used)


def share_out(
    total: float, shares: Mapping[str, float], left: Mapping[str, float]
) -> dict[str, float]:
    """Tokens by share; where one is spent, it leaves and the others share on from there."""
    given = dict.fromkeys(shares, 0.0)
    active = {name for name in shares if left[name] > 0}
    while active and total > 0:
        whole = math.fsum(shares[name] for name in active)
        first = min(sorted(active), key=lambda name: (left[name] - given[name]) / shares[name])
        part = min(total, (left[first] - given[first]) * whole / shares[first])
        for name in active:
            given[name] += part * shares[name] / whole
        if part < total:
            given[first] = left[first]
            active.discard(first)
        total -= part
    return given
