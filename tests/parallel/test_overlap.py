"""The exchange of tokens beside computation: as one process computes, and in the right order."""

from pathlib import Path
from typing import Any

import pytest

from .ranks import launch

RANKS = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=RANKS, ids="{} ranks".format)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out: Path = tmp_path_factory.mktemp("overlap") / "found.json"
    return launch(request.param, "overlap_worker.py", out)


def test_values_and_gradients_are_those_of_one_process(found: Any) -> None:
    """Also with activations recomputed, and where a rank gets no rows."""
    assert len(found["parity"]) == 6 and len(found["starved"]) == 2
    for case, result in {**found["parity"], **found["starved"]}.items():
        assert result["experts"] > 0, f"{case}: nothing was cut"
        assert result["loss"] < 1e-10 and result["gradient"] < 1e-10, case


def test_two_steps_have_the_same_bits(found: Any) -> None:
    assert all(result["same_bits"] for result in found["parity"].values())


@pytest.mark.parametrize("exchange", ["all_to_all", "all_gather"])
def test_tokens_travel_beside_the_layer(found: Any, exchange: str) -> None:
    """What is started before a part begins and waited for after it ends ran beside it."""
    order: list[str] = found["events"][exchange]
    for earlier, later in [
        ("2 starts", "dense_0 begins"),
        ("dense_0 ends", "mixer_1 begins"),
        ("mixer_1 ends", "2 is waited for"),
        ("3 starts", "dense_1 begins"),
        ("dense_1 ends", "3 is waited for"),
        ("4 starts", "dense_1 backward begins"),
        ("dense_1 backward ends", "4 is waited for"),
        ("4 goes on", "5 starts"),
        ("5 starts", "mixer_1 backward begins"),
        ("mixer_1 backward ends", "dense_0 backward begins"),
        ("dense_0 backward ends", "5 is waited for"),
    ]:
        assert order.index(earlier) < order.index(later), f"{earlier} before {later}"
    assert [event for event in order if event.endswith(" starts")] == [
        f"{number} starts" for number in range(1, 6)
    ]
