"""Each alarm is provoked, and stays silent on healthy telemetry."""

import itertools
import random
from collections.abc import Mapping
from typing import Any

import pytest
from make_run import NUM_FFN, NUM_ZERO, TOP_K, layer, line

from moebius.config import from_json, to_json
from moebius.monitor.alarms import AlarmConfig, Alarms

ROLES = ("matrix",)


def told(lines: list[dict[str, Any]], **thresholds: Any) -> list[str]:
    alarms = Alarms(AlarmConfig(**thresholds), adam_eps=1e-16, roles=ROLES)
    return [message for item in lines for message in alarms.check(item)]


def run(stats: Mapping[str, Any], length: int = 60) -> list[dict[str, Any]]:
    """A run in which layer 1 has other telemetry from step 30 on."""
    changed = (layer() | dict(stats) if i >= 30 else layer() for i in range(length))
    return [line(i, layers={"0": layer(), "1": last}) for i, last in enumerate(changed)]


def collapsed() -> dict[str, Any]:
    """Every token picks the same S experts."""
    return layer([1 / TOP_K] * TOP_K + [0.0] * (NUM_FFN - TOP_K + NUM_ZERO))


def healthy_layer(rng: random.Random, experts: int, spread: float) -> dict[str, Any]:
    weights = [max(0.05, rng.gauss(1, spread)) for _ in range(experts)]
    shares = [weight / sum(weights) for weight in weights]
    stats = layer() | {"load": shares, "num_ffn": experts, "max_load": max(shares)}
    return stats | {"ffn_hist": [1 / 7] * 7, "effective_experts": 0.985 * experts}


@pytest.mark.parametrize("spread", [0.065, 0.367])
def test_healthy_telemetry_raises_nothing(spread: float) -> None:
    rng = random.Random(0)
    lines = [
        line(i, layers={str(k): healthy_layer(rng, 64, spread) for k in range(4)})
        for i in range(200)
    ]
    assert told(lines) == []


def test_collapse_of_one_layer_fires_while_the_loss_falls() -> None:
    lines = run(collapsed())
    assert all(a["loss"] > b["loss"] for a, b in itertools.pairwise(lines))
    messages = [text for text in told(lines) if text.startswith("collapse")]
    assert len(messages) == 1
    assert messages[0].startswith("collapse, layer 1: max load 0.333 is near 1/S = 0.333")
    assert "threshold 0.258" in messages[0]  # 1/12 + 0.7 (1/3 - 1/12)


def test_collapse_of_4096_experts_that_a_threshold_on_total_collapse_misses() -> None:
    # Load CV 16.5, as published: about E / (1 + CV^2) = 15 experts do the work, twice top-k.
    experts, busy = 4096, 15
    load = [1 / busy] * busy + [0.0] * (experts - busy)
    stats = {"load": load, "num_ffn": experts, "max_load": 1 / busy, "ffn_hist": [0.125] * 8}
    stats |= {"effective_experts": float(busy), "bias_min": None}
    messages = told([line(i, layers={"1": stats}) for i in range(60)], dead_experts=experts)
    assert messages == ["collapse, layer 1: 15 effective experts of 4096 (threshold 1.02e+03)"]


def test_a_collapse_that_heals_within_half_a_window_is_silent() -> None:
    lines = run({})
    for item in lines[30:34]:
        item["layers"]["1"] = collapsed()
    assert told(lines) == []


def test_noise_of_the_first_steps_is_silent() -> None:
    lines = [line(i, layers={"0": collapsed()}) if i < 20 else line(i) for i in range(60)]
    assert told(lines) == []


def test_a_crowded_zero_expert_is_no_collapse() -> None:
    load = [1 / 12] * NUM_FFN + [1 / 3, 0.0, 0.0, 0.0]
    assert told(run(layer(load))) == []


def test_a_layer_where_every_expert_is_always_picked_is_no_collapse() -> None:
    stats = {"load": [1 / 3] * 3, "num_ffn": 3, "max_load": 1 / 3, "effective_experts": 3.0}
    assert told(run(stats)) == []


def test_dead_experts_are_named() -> None:
    load = [0.0, *layer()["load"][1:]]
    assert told(run(layer(load))) == [
        "dead experts, layer 1: 1 experts without a token: 0 (threshold: more than 0)"
    ]
    assert told(run(layer(load)), dead_experts=1) == []


def test_experts_that_are_idle_in_turn_are_not_dead() -> None:
    lines = run({})
    for i, item in enumerate(lines):
        load = layer()["load"]
        load[i % NUM_FFN] = 0.0
        item["layers"]["1"] = layer(load)
    assert told(lines) == []


def test_saturated_bias_is_measured_by_the_mean_score() -> None:
    wide = run({"bias_min": -1.5, "bias_max": 0.6})
    # 12 outputs: 30 mean scores are 2.5, so the limit is the scores' own, 2.
    assert told(wide) == [
        "saturated bias, layer 1: bias range 2.1 against a mean score of 0.0833 (threshold 2)"
    ]
    assert told(run({"bias_min": -1.2, "bias_max": 0.6})) == []
    narrow = run({"bias_min": -0.3, "bias_max": 0.6})
    assert told(narrow, bias_range=10.0) == [
        "saturated bias, layer 1: bias range 0.9 against a mean score of 0.0833 (threshold 0.833)"
    ]
    sigmoid = run({"bias_min": -0.3, "bias_max": 0.6, "mean_score": 0.5})
    assert told(sigmoid, bias_range=10.0) == []


def test_published_healthy_bias_of_a_sigmoid_router_is_silent() -> None:
    assert told(run({"bias_min": -0.57, "bias_max": 0.73, "mean_score": 0.5})) == []


def test_a_budget_that_swings_from_step_to_step_while_its_mean_holds() -> None:
    lines = run({})
    for i, item in enumerate(lines):
        item["layers"]["1"] = layer() | {"ffn_mean": 3.0 if i % 2 else 1.0}
    assert told(lines) == [
        "unsteady budget, layer 1: FFN experts a token swing by 1 around 2 (threshold 0.6)"
    ]
    assert told(lines, budget_swing=0.5) == []


def test_a_budget_that_drifts_is_not_unsteady() -> None:
    drifting = (layer() | {"ffn_mean": 3 - i / 40} for i in range(60))
    assert told([line(i, layers={"1": stats}) for i, stats in enumerate(drifting)]) == []


def test_r_g_above_a_tenth() -> None:
    assert told(run({"r_g": 0.12})) == [
        "R_g, layer 1: R_g 0.12: the balance loss steers the router (threshold 0.1)"
    ]
    assert told(run({"r_g": 0.09})) == []
    assert told(run({"r_g": None})) == []


def test_gradient_rms_near_eps() -> None:
    small = {"matrix": {"grad_rms": 5e-14}, "norm": {"grad_rms": 5e-14}}
    lines = [line(i, roles=small) for i in range(60)]
    assert told(lines) == [
        "gradient near eps, role matrix: gradient RMS 5e-14 is near Adam's eps 1e-16 "
        "(threshold 1e-13)"
    ]
    assert told([line(i, roles={"matrix": {"grad_rms": 2e-13}}) for i in range(60)]) == []


def test_an_alarm_is_repeated_after_so_many_lines() -> None:
    lines = [line(i, layers={"0": collapsed()}) for i in range(20, 141)]
    steps = []
    alarms = Alarms(AlarmConfig(window=5, repeat_every=50, dead_experts=9), 1e-16, ROLES)
    for item in lines:
        steps += [item["step"]] * len(alarms.check(item))
    assert steps == [24, 74, 124]


def test_lines_without_layers_or_roles_raise_nothing() -> None:
    assert told([{"step": i, "loss": 2.0} for i in range(50)]) == []


def test_config_is_strict_and_goes_through_json() -> None:
    config = AlarmConfig(window=3, r_g=0.2)
    assert from_json(AlarmConfig, to_json(config)) == config
    with pytest.raises(ValueError, match="at least 1"):
        AlarmConfig(window=0)
