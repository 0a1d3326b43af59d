"""What a run may change when it goes on, besides what only runs it.

Its plan from now on: stages that begin at or after the tokens it has, and with new ones a longer
horizon. Imported weights are no run before their first step: all but the model, its vocabulary and
its tokenizer may be set. Anything else identifies the experiment and is refused.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebius.train.run import TOKENIZER, Run, check_same_experiment
from moebius.train.sections import section_at, sections_of


def unborn(record: Mapping[str, Any], counters: Mapping[str, Any]) -> bool:
    """Whether a run holds imported weights that have not done a step."""
    return "imported" in record and bool(counters.get("weights_only"))


def with_own_tokenizer(run: Run, folder: Path, record: Mapping[str, Any]) -> Run:
    """The run; one whose weights are imported reads text with the tokenizer that came along."""
    if "imported" not in record or run.data.tokenizer is not None:
        return run
    document = record["imported"].get("document")
    data = dataclasses.replace(
        run.data, tokenizer=str(folder / TOKENIZER), document=run.data.document or document
    )
    return dataclasses.replace(run, data=data)


def check_change(
    old: Run, new: Run, record: Mapping[str, Any], counters: Mapping[str, Any]
) -> None:
    """ValueError unless the run whose newest checkpoint has these counters may become `new`."""
    if unborn(record, counters):
        data = dataclasses.replace(new.data, tokenizer=old.data.tokenizer)
        settled = dataclasses.replace(new, model=old.model, vocab=old.vocab, data=data)
        check_same_experiment(settled, new)
        return
    _check_stages(old, new, counters["tokens"])
    if new.stages:
        step = counters["step"]
        counted = section_at(sections_of(new), step).tokens_until(step)
        if counted != counters["tokens"]:
            raise ValueError(
                f"the checkpoint of step {step} has {counters['tokens']} tokens and the recipe "
                f"gives {counted}; stages begin at exact counts, so restore batch and length"
            )


def _check_stages(old: Run, new: Run, tokens: int) -> None:
    """ValueError unless the two differ in what is to come alone."""
    longer = new.steps > old.steps and bool(set(new.stages) - set(old.stages))
    steps = old.steps if longer else new.steps
    check_same_experiment(old, dataclasses.replace(new, stages=old.stages, steps=steps))
    begun = [stage for stage in old.stages if stage.at_tokens < tokens]
    for i, stage in enumerate(begun):
        if new.stages[i : i + 1] != (stage,):
            raise ValueError(
                f"stage {i + 1} began at {stage.at_tokens:,} tokens and the run has {tokens:,}; "
                "a stage that has begun cannot change"
            )
    for i, stage in enumerate(new.stages[len(begun) :], len(begun) + 1):
        if stage.at_tokens < tokens:
            raise ValueError(
                f"stage {i} begins at {stage.at_tokens:,} tokens and the run has {tokens:,}; "
                "a further stage begins there or later"
            )
