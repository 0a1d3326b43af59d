"""Rules in real runs: what is saved, resumed and evaluated, by the real command line."""

import json
from pathlib import Path

import pytest
import torch

from moebius import checkpoint
from moebius.optim.optimizer import ROLES

from ..running import UNJUDGED, Place

STATELY = ("embedding", "head", "norm", "bias", "scalar", "router")


def rules(matrix: str, other: str) -> list[str]:
    return [f"optim.roles.{r}.rule={other if r in STATELY else matrix}" for r in ROLES]


@pytest.mark.parametrize(
    ("matrix", "other"),
    [
        ("schedule_free", "schedule_free"),
        ("soap", "ademamix"),
        ("lion", '{"use": "adamw", "state_dtype": "bf16", "rounding": "stochastic"}'),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(place: Place, matrix: str, other: str) -> None:
    # The stage rebuilds model and optimizer at step 2.
    stage = 'stages=[{"at_tokens": 256, "sequence_length": 64}]'
    fields = (*rules(matrix, other), UNJUDGED, "steps=6", "checkpoint_every=3", stage)
    whole = place.train(f"{matrix}-whole", *fields)
    parts = place.train(f"{matrix}-parts", *fields, "stop_at=3")
    assert place.cli("train", "--resume", parts, "stop_at=none").code == 0
    tensors, again = (
        checkpoint.load(run / "checkpoints" / "step-00000006")[0] for run in (whole, parts)
    )
    assert tensors.keys() == again.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, again[name]), name


def test_averages_of_schedule_free_are_saved_and_evaluated(place: Place) -> None:
    look = f"evaluation={Path(__file__).with_name('seen.py')}:norms"
    run = place.train("averages", *rules("schedule_free", "schedule_free"), "steps=4", look)
    seen = json.loads((run / "summary.json").read_bytes())
    tensors, _ = checkpoint.load(run / "checkpoints" / "step-00000004")
    averages = [name for name in tensors if name.endswith(".average")]
    assert averages
    for name in averages:
        weight = name.removeprefix("optim.").removesuffix(".average")
        assert torch.equal(tensors[name], tensors[f"model.{weight}"]), weight
        assert seen[weight] == float(tensors[name].norm())
        assert not torch.equal(tensors[name], tensors[name.replace(".average", ".base")]), weight
