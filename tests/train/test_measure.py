"""The line of a logged step: every router has its place, and active parameters are counted."""

from pathlib import Path

import pytest

import moebius
from moebius.model.ffn.moe import routers_of

from ..running import UNJUDGED, Place, lines

DENSE = 'model.layers.0.dense={"use": "moe", "experts": 4, "expert_width": 16, "top_k": 1}'


@pytest.fixture(scope="module")
def run(place: Place) -> Path:
    """One layer with three routers: that of the MoE, and of two sparse FFNs in the dense path."""
    return place.train("three", DENSE, "stop_at=4", UNJUDGED)


def test_every_router_of_a_layer_is_shown(run: Path) -> None:
    for line in lines(run):
        layers = line["layers"]
        assert [layers[name]["num_ffn"] for name in ("0.0", "0.1", "0.2")] == [8, 4, 4]
        assert [len(layers[name]["load"]) for name in layers] == [12, 4, 4]
        assert layers["0.1"]["ffn_mean"] == layers["0.2"]["ffn_mean"] == 1
        assert layers["0.1"]["load"] != layers["0.2"]["load"]
        assert all(layer["r_g"] is None for layer in layers.values())


def test_active_parameters_follow_the_measured_budget(run: Path) -> None:
    lm = moebius.load(run)[0].lm
    (block,) = lm.blocks()
    moes = routers_of(block)
    sizes = [m.w_gate_up_E2FD.numel() + m.w_down_EDF.numel() for m in moes]
    experts = [size // m.layout.num_ffn for size, m in zip(sizes, moes, strict=True)]
    # All but the embedding and the experts is read by every token.
    always = sum(weight.numel() for weight in lm.parameters()) - sum(sizes) - lm.embed.w_VD.numel()
    for line in lines(run):
        means = [line["layers"][name]["ffn_mean"] for name in ("0.0", "0.1", "0.2")]
        used = sum(mean * each for mean, each in zip(means, experts, strict=True))
        assert line["active_mean"] == pytest.approx(always + used, abs=1)
        assert line["active_min"] < line["active_mean"] < line["active_max"]


def test_one_router_has_the_name_of_its_layer(place: Place) -> None:
    run = place.train("wild", "stop_at=2", UNJUDGED, recipe="wild")
    for line in lines(run):
        assert list(line["layers"]) == ["1", "2"]
        assert line["layers"]["1"]["r_g"] > 0
        assert line["layers"]["1"]["recycled"] > 0
        assert len(line["hidden_rms"]) == 3 and min(line["hidden_rms"]) > 0
        assert {"expert", "router", "matrix", "head", "norm", "scalar"} <= line["roles"].keys()
