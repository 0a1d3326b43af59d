"""A loss or gradient that is not finite skips the update and nothing else; many end the run."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moebius.checkpoint import complete, load
from moebius.config import override
from moebius.data.loader import Loader
from moebius.data.prepare import prepare
from moebius.recipes import recipe
from moebius.train.run import Run
from moebius.train.state import TrainState, new_state
from moebius.train.step import train_step

from ..running import UNJUDGED, Outcome, Place, lines

SPIKY = f"{Path(__file__).with_name('spikes.py')}:spiky"


def run_of(place: Place, *fields: str) -> Run:
    return override(recipe(SPIKY), place.fields(*fields))


def steps_of(run: Run) -> Iterator[tuple[TrainState, dict[str, torch.Tensor], float]]:
    """The state after every step, a copy of its tensors, and the loss."""
    prepared = prepare(run.data, run.vocab)
    loader = Loader(prepared, run.sequence_length, run.batch, run.seed)
    state = new_state(run, torch.device("cpu"))
    while True:
        result = train_step(run, state, loader.batch(state.step), torch.float32, None, False)
        yield state, {name: x.clone() for name, x in state.tensors().items()}, result.loss


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that are equal to the last bit."""
    assert left.keys() == right.keys()
    return [name for name in left if torch.equal(left[name], right[name])]


@pytest.mark.parametrize("kind", ["value", "gradient"])
def test_the_state_stays_and_time_goes_on(kind: str, place: Place) -> None:
    steps = steps_of(run_of(place, f"model.ends.1.{kind}=[2]"))
    plain = steps_of(run_of(place))
    for _ in range(2):
        (_, before, _), (_, expected, _) = next(steps), next(plain)
        assert same(before, expected) == list(before)
    state, after, loss = next(steps)
    assert math.isnan(loss) == (kind == "value")
    assert any(".bias" in name for name in after) and any("optim." in name for name in after)
    assert same(before, after) == list(before)
    assert (state.step, state.tokens, state.skipped, state.bad_in_a_row) == (3, 3 * 128, 1, 1)
    _, later, loss = next(steps)
    assert math.isfinite(loss)
    moved = set(later) - set(same(after, later))
    assert moved == set(before) - set(same(before, expected_after_two(place))) - {"random.cpu"}
    assert (state.step, state.skipped, state.bad_in_a_row) == (4, 1, 0)


def expected_after_two(place: Place) -> dict[str, torch.Tensor]:
    """The tensors of a plain run three steps in, to see which ones a step moves."""
    steps = steps_of(run_of(place))
    return [next(steps)[1] for _ in range(3)][-1]


def test_the_next_step_reads_the_next_batch(place: Place) -> None:
    """The loss after a skipped step is that of the old weights on the batch in turn."""
    run = run_of(place, "model.ends.1.value=[2]")
    steps = steps_of(run)
    losses = [next(steps)[2] for _ in range(4)]
    plain = steps_of(run_of(place))
    state = [next(plain)[0] for _ in range(2)][-1]
    prepared = prepare(run.data, run.vocab)
    loader = Loader(prepared, run.sequence_length, run.batch, run.seed)
    state.step = 3
    result = train_step(run_of(place), state, loader.batch(3), torch.float32, None, False)
    assert losses[3] == result.loss


def train(place: Place, out: str, *fields: str) -> Outcome:
    return place.cli("train", SPIKY, *place.fields(*fields), "--out", out)


def test_a_skipped_step_is_counted_and_its_documents_are_listed(place: Place) -> None:
    fields = ("model.ends.1.value=[2]", "model.ends.1.gradient=[6]", "log_every=1")
    done = train(place, "skips", *fields)
    assert done.code == 0, done.err
    assert "step 3: loss or gradient not finite, update skipped" in done.out
    run = place.folder / "skips"
    found = lines(run)
    assert [line["skipped"] for line in found] == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert [line["step"] for line in found if line["loss"] is None] == [3]
    assert found[2]["loss_hex"] == "nan" and found[6]["grad_norm"] is None
    skipped = [line for line in lines(run, "events.jsonl") if line["kind"] == "skipped"]
    assert [event["step"] for event in skipped] == [3, 7]
    config = run_of(place)
    loader = Loader(prepare(config.data, config.vocab), 32, 4, config.seed)
    assert [event["documents"] for event in skipped] == [
        loader.batch(step).keys() for step in (2, 6)
    ]
    assert all(event["documents"] for event in skipped)
    assert json.loads((run / "summary.json").read_text())["skipped_steps"] == 2
    assert place.cli("compare", run, "--json").data()[0]["skipped_steps"] == 2
    assert "skipped" in (run / "report.html").read_text(encoding="utf-8")


def test_many_in_a_row_end_the_run_with_its_state_saved(place: Place) -> None:
    fields = ("model.ends.1.value=[2,4,5,6]", "max_bad_steps=3", "checkpoint_every=100")
    done = train(place, "stuck", *fields)
    run = place.folder / "stuck"
    assert "3 updates in a row were not finite; the state is saved at step 7" in done.error
    assert str(run / "events.jsonl") in done.error
    (saved,) = complete(run / "checkpoints")
    _, counters = load(saved)
    assert (counters["step"], counters["skipped"], counters["bad_in_a_row"]) == (7, 4, 3)
    assert [line["step"] for line in lines(run)] == list(range(1, 8))
    further = place.cli("train", "--resume", run, UNJUDGED)
    assert further.code == 0, further.err
    assert [line["step"] for line in lines(run)] == list(range(1, 13))
    assert lines(run)[-1]["skipped"] == 4
