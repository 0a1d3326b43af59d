"""A run laid out in steps: one section before the first stage, and one for each stage.

Steps stay the unit of the schedule: `steps` is its horizon whatever a step's tokens are, percents
are of steps, and token durations are counted at the run's base batch and sequence length. Only the
beginnings of stages are counted in tokens trained on. `batch_ramp` ends where the first stage
begins; later batches are the stages' own.
"""

import bisect
from dataclasses import dataclass, replace

from moebius.data.loader import Loader, Sizes
from moebius.data.prepared import Prepared
from moebius.model.lm import ModelConfig
from moebius.model.longer import rope_bases, with_rope_base
from moebius.train.run import Run
from moebius.train.stages import Stage, check_weights


@dataclass(frozen=True)
class Section:
    """The steps `first_step` to `end_step` (not included), all with sequences of one length."""

    # The stage's number from 1 on; 0 is what comes before the first stage.
    index: int
    first_step: int
    end_step: int
    # Targets trained on before the first step.
    first_tokens: int
    sequence_length: int
    batch: int
    ramp: tuple[tuple[int, int], ...]
    rope_base: float | None
    model: ModelConfig
    # Shares of the sources; empty: their own.
    weights: tuple[float, ...] = ()

    def tokens_until(self, step: int) -> int:
        """Targets before a step of this section."""
        sizes = Sizes(self.batch, self.ramp, self.first_step)
        return self.first_tokens + sizes.until(step) * self.sequence_length

    def describe(self) -> str:
        """One line of what is in force, for notes and events."""
        base = "" if self.rope_base is None else f", rope base {self.rope_base:g}"
        if self.weights:
            base += f", weights {', '.join(f'{weight:g}' for weight in self.weights)}"
        return (
            f"stage {self.index} from step {self.first_step} ({self.first_tokens:,} tokens) on: "
            f"{self.batch} sequences of {self.sequence_length:,} tokens a step{base}"
        )


def sections_of(run: Run) -> tuple[Section, ...]:
    """The sections of a run; ValueError where a stage fits no step, the run ends before it, or
    weights do not fit the sources."""
    check_weights(run.weights, run.stages, [source.path for source in run.data.mixture()])
    first = (run.sequence_length, run.batch, run.batch_ramp, None, run.model, run.weights)
    sections = [Section(0, 0, run.steps, 0, *first)]
    for i, stage in enumerate(run.stages, 1):
        before = sections[-1]
        step = _step_of(stage.at_tokens, before, f"stage {i}")
        if step >= run.steps:
            raise ValueError(
                f"stage {i} begins at {stage.at_tokens:,} tokens, which is after {step} steps, and "
                f"the run has {run.steps}; raise steps above {step} or leave the stage out"
            )
        if before.ramp and before.ramp[-1][0] >= step:
            raise ValueError(
                f"stage {i} begins after {step} steps, before batch_ramp is over (at step "
                f"{before.ramp[-1][0]}); give later batches to stages"
            )
        batch = _batch_of(stage, before, step, f"stage {i}")
        model = before.model
        if stage.rope_base is not None:
            if not any(True for _ in rope_bases(model)):
                raise ValueError(f"stage {i} sets rope_base, and no mixer has rotary positions")
            model = with_rope_base(model, stage.rope_base)
        base = before.rope_base if stage.rope_base is None else stage.rope_base
        sections[-1] = replace(before, end_step=step)
        own = (stage.at_tokens, stage.sequence_length, batch, (), base, model)
        sections.append(Section(i, step, run.steps, *own, stage.weights or run.weights))
    return tuple(sections)


def _step_of(tokens: int, before: Section, name: str) -> int:
    """The step before which exactly so many tokens are trained on."""
    first = before.first_step
    most = max(0, tokens - before.first_tokens)
    later = bisect.bisect_left(
        range(most + 1), tokens, key=lambda n: before.tokens_until(first + n)
    )
    step = first + later
    above = before.tokens_until(step)
    if above != tokens:
        below = before.tokens_until(max(first, step - 1))
        raise ValueError(
            f"{name} begins at {tokens:,} tokens, inside a step; the nearest token counts that fit "
            f"are {below} and {above}"
        )
    return step


def _batch_of(stage: Stage, before: Section, step: int, name: str) -> int:
    if stage.batch is not None:
        return stage.batch
    tokens = before.tokens_until(step) - before.tokens_until(step - 1)
    if tokens % stage.sequence_length:
        raise ValueError(
            f"{name}: the {tokens:,} tokens of a step are no whole number of sequences of "
            f"{stage.sequence_length:,}; set its batch"
        )
    return tokens // stage.sequence_length


def section_at(sections: tuple[Section, ...], step: int) -> Section:
    """The section that a step belongs to (the last one, once all steps are done)."""
    return next(section for section in reversed(sections) if section.first_step <= step)


def loaders(run: Run, sections: tuple[Section, ...], prepared: Prepared) -> tuple[Loader, ...]:
    """A loader a section, each going on where the one before it ends.

    ValueError where capped sources cannot serve all of their steps.
    """
    made: list[Loader] = []
    for section in sections:
        start = made[-1].after(section.first_step) if made else None
        shape = (section.sequence_length, section.batch, run.seed, section.ramp)
        loader = Loader(prepared, *shape, start=start, weights=section.weights)
        loader.check(section.end_step)
        made.append(loader)
    return tuple(made)
