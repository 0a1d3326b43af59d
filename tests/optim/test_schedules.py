"""Schedules at the points that define them, and durations in their three units."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebius.config import from_json, override, to_json
from moebius.optim.schedules import Duration, Schedule, in_steps
from moebius.optim.schedules.constant import Constant
from moebius.optim.schedules.cosine import Cosine
from moebius.optim.schedules.three_phase import ThreePhase
from moebius.optim.schedules.wsd import WSD

TOKENS = 4096


def factors(schedule: Schedule, total: int) -> list[float]:
    return [schedule.factor(step, total, TOKENS) for step in range(total)]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (200, 200),
        ("200", 200),
        (" 200 steps ", 200),
        ("1 step", 1),
        ("5%", 50),
        ("0.5 %", 5),
        ("4096 tokens", 1),
        ("4097 tokens", 2),
        ("3e6 tokens", 733),
        ("0", 0),
    ],
)
def test_a_duration_in_steps(text: Duration, steps: int) -> None:
    assert in_steps(text, 1000, TOKENS) == steps


@given(st.integers(0, 100), st.integers(1, 500), st.integers(1, 10_000))
def test_the_three_units_agree(percent: int, hundredth: int, tokens: int) -> None:
    total = 100 * hundredth
    steps = percent * hundredth
    assert in_steps(f"{percent}%", total, tokens) == steps
    assert in_steps(f"{steps * tokens} tokens", total, tokens) == steps
    assert in_steps(steps, total, tokens) == steps


@pytest.mark.parametrize("text", ["", "fast", "-3", "2.5", "101%", "5 epochs", "1e999", "%"])
def test_a_bad_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*duration[^\n]*$"):
        in_steps(text, 1000, TOKENS)


@pytest.mark.parametrize(
    "schedule",
    [
        Constant("10"),
        Cosine("10", 0.1),
        WSD("10", "30", 0.1),
        WSD("10", "30", 0.1, "sqrt"),
        WSD("10", "30", 0.1, "cosine"),
        ThreePhase("10", "5%", 0.5, 0.1),
    ],
)
def test_every_schedule_warms_up_then_never_rises(schedule: Schedule) -> None:
    values = factors(schedule, 100)
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in itertools.pairwise(values[9:]))
    assert values[-1] == pytest.approx(1.0 if isinstance(schedule, Constant) else 0.1)


def test_cosine_halfway() -> None:
    values = factors(Cosine("0", 0.2), 100)
    assert values[49] == pytest.approx(0.6)
    assert values[24] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_wsd_shapes() -> None:
    stable = factors(WSD("10%", "20%", 0.0), 100)
    assert stable[10:80] == [1.0] * 70
    assert stable[80:] == pytest.approx([1 - (i + 1) / 20 for i in range(20)])
    assert factors(WSD("0", "20", 0.0, "sqrt"), 100)[84] == pytest.approx(0.5)
    assert factors(WSD("0", "20", 0.0, "cosine"), 100)[89] == pytest.approx(0.5)
    assert factors(WSD("0", "0", 0.0), 10) == [1.0] * 10


def test_three_phases() -> None:
    values = factors(ThreePhase("10", "5%", 0.5, 0.1), 200)
    assert values[99] == pytest.approx(0.75)
    assert values[189] == pytest.approx(0.5)
    assert values[190:] == pytest.approx([0.5 - 0.04 * (i + 1) for i in range(10)])


@pytest.mark.parametrize(
    "schedule", [Constant("60"), Cosine("60"), WSD("40", "40"), ThreePhase("50")]
)
def test_phases_longer_than_the_run_are_refused(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match="do not fit into a run of 50"):
        schedule.factor(0, 50, TOKENS)


def test_bad_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="floor=2"):
        Cosine(floor=2.0)
    with pytest.raises(ValueError, match="must not lie above"):
        ThreePhase(middle=0.05)


@pytest.mark.parametrize("name", sorted(Schedule.TABLE))
def test_json_round_trip_and_overrides(name: str) -> None:
    schedule = from_json(Schedule, name)
    assert from_json(Schedule, to_json(schedule)) == schedule
    for text in ("5%", "7", "3e4 tokens"):
        assert override(schedule, [f"warmup={text}"]).warmup == text
