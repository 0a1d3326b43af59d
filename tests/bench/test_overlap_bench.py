"""The benchmark of exposed communication: two processes that agree with one, and its chart."""

from typing import Any

import pytest

from moebius.bench.timeline import EXCHANGES, bars, lines

from ..running import Place


@pytest.mark.slow
def test_both_blocks_are_measured_with_and_without_overlap(place: Place) -> None:
    """Without a delay, so that nothing is slept; with one the figures mean something."""
    options = ["--delay-ms", "0", "--tokens", "12", "--width", "16", "--repeats", "1", "--json"]
    result = place.cli("bench", "overlap", *options).data()
    rows = result["rows"]
    assert [(row["name"], row["overlap"]) for row in rows] == [
        (name, overlap) for name in ("scmoe", "prenorm") for overlap in (True, False)
    ]
    for row in rows:
        assert row["agrees"] and row["error"] < 1e-5
        assert row["own_seconds"] > 0 and row["own_exposed"] is None
    for events in result["events"].values():
        assert [what for what, _ in events if what.endswith(" starts")] == [
            f"{number} starts" for number in range(1, 1 + len(EXCHANGES))
        ]
    text = lines(result, as_json=False)
    assert text.count("```") == 4 and any(line.startswith("| scmoe | on |") for line in text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--exchange", "ring"], "exchange: 'ring' is not valid"),
        (["--width", "12"], "width a multiple of 8"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(place: Place, arguments: list[str], said: str) -> None:
    assert said in place.cli("bench", "overlap", *arguments).error


def test_bars_show_what_ran_beside_what() -> None:
    events: list[tuple[str, float]] = [("dense begins", 0.0), ("dense ends", 32.0)]
    for number in range(1, 6):
        start = 32.0 + 4 * (number - 1)
        # Under way for 2, waited for the second half; the last one for all of it.
        waited = start + (0 if number == 5 else 1)
        events += [(f"{number} starts", start), (f"{number} is waited for", waited)]
        events += [(f"{number} arrived", start + 2), (f"{number} goes on", start + 2)]
    events.append(("end ends", 64.0))
    events = [(what, at / 1e3) for what, at in events]
    shown: dict[str, Any] = {line[:24].strip(): line[38:] for line in bars(events)[1:]}
    assert shown["dense"] == 32 * "#"
    assert shown["counts"] == 32 * " " + "=!" and shown["dispatch"] == 36 * " " + "=!"
    assert shown["dispatch backward"] == 48 * " " + "!!"
    assert shown["experts"] == 38 * " " + "##" and len(shown) == 8
