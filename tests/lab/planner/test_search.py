"""Plans as printed and as JSON, and published runs: within 15%, or it is said what bounds them."""

import dataclasses
import json
import statistics

import pytest
from typer.testing import CliRunner

from moebius.cli import app
from moebius.config import override
from moebius.lab.planner.hardware import WHOLE_RUN
from moebius.lab.planner.points import Point, decoding_points, training_points, whole_run
from moebius.lab.planner.search import plan_inference, plan_training
from moebius.model.ends.mtp import MTP
from moebius.model.ffn.dense import Dense
from moebius.model.mixers.mla import MLA
from moebius.recipes import recipe
from moebius.train.run import Run


def deepseek_with_mtp() -> Run:
    """DeepSeek-V3 in fp8 with its prediction depth, as a dense layer of 8 + 1 experts' FLOPs."""
    run = override(recipe("deepseek-v3"), ["precision=fp8"])
    mixer = MLA(128, 1536, 512, 128, 64, 128)
    ends = (MTP(mixer, Dense(9 * 2048)),)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, ends=ends))


@pytest.fixture(scope="module")
def points() -> list[Point]:
    training = training_points(recipe("llama3-405b"), deepseek_with_mtp())
    return [*training, *decoding_points(recipe("longcat-flash"))]


def test_published_runs_are_predicted_or_what_bounds_them_is_said(points: list[Point]) -> None:
    far = {point.name for point in points if abs(point.deviation) > 0.15}
    assert far == {point.name for point in points if point.bound}
    assert far == {
        "LongCat-Flash, experts",
        "LongCat-Flash, bf16, 5,000 tokens, 68.9 a user",
        "LongCat-Flash, fp8, 5,000 tokens, 26.4 a user",
        "LongCat-Flash, fp8, 8,192 tokens, 33.8 a user",
    }


def test_a_run_has_no_part_in_the_factor_it_is_predicted_with(points: list[Point]) -> None:
    training = [point for point in points if point.alone is not None]
    assert [point.unit for point in training] == ["MFU", "MFU", "MFU", "M hours"]
    ratios = [
        point.published / point.alone if point.unit == "M hours" else point.alone / point.published
        for point in training
        if point.alone is not None
    ]
    assert min(ratios) > 1.1 and max(ratios) < 1.35
    assert round(whole_run(ratios), 2) == WHOLE_RUN
    for i, point in enumerate(training):
        others = statistics.geometric_mean(ratio for j, ratio in enumerate(ratios) if j != i)
        # The other way round for MFU, which falls as hours grow.
        off = others / ratios[i] if point.unit == "M hours" else ratios[i] / others
        assert 1 + point.deviation == pytest.approx(off, rel=1e-9)


def test_longcat_flash_in_theory(points: list[Point]) -> None:
    found = {point.name: point for point in points}
    for name in ("LongCat-Flash, layer", "LongCat-Flash, a token in theory"):
        assert 0 < found[name].deviation < 0.10


def test_the_best_layouts_come_first_and_fit() -> None:
    report = json.loads(json.dumps(plan_training(recipe("llama3-8b"), "2x8xH200", best=100)))
    seconds = [row["seconds"] for row in report["best"]]
    assert seconds == sorted(seconds)
    assert len(seconds) + report["not_fitting"] == report["layouts"]
    row = report["best"][0]
    spent = [row[name] for name in ("compute", "exposed", "idle", "data", "optimizer")]
    assert row["whole"] == pytest.approx((1 - 1 / WHOLE_RUN) * row["seconds"])
    assert sum(spent) <= row["seconds"] / WHOLE_RUN * 1.001
    assert all(row["memory_bytes"] <= 141e9 for row in report["best"])
    rate = report["tokens_per_step"] / row["seconds"]
    assert row["tokens_per_day"] == pytest.approx(86_400 * rate)
    assert row["dollars_per_trillion"] == pytest.approx(1e12 / rate / 3600 * 16 * 2.0)
    assert 0.3 < row["mfu"] < 0.75


def test_what_does_not_fit_is_counted_and_what_nothing_fits_is_refused() -> None:
    report = plan_training(recipe("llama3-70b"), "2x8xH100")
    assert 0 < report["not_fitting"] < report["layouts"]
    with pytest.raises(ValueError, match=r"none of the .* layouts .* the leanest needs"):
        plan_training(recipe("llama3-405b"), "8xH100")
    with pytest.raises(ValueError, match="precision=bf16, not fp64"):
        plan_training(override(recipe("llama3-8b"), ["precision=fp64"]), "8xH100")
    with pytest.raises(ValueError, match="holds no sequence"):
        plan_training(recipe("llama3-8b"), "8xH100", batch_tokens=100)


def test_decoding_fits_as_many_sequences_as_it_says() -> None:
    report = plan_inference(recipe("kimi-linear-48b-a3b"), "8xH100", context=4096)
    rates = [row["tokens_per_second"] for row in report["best"]]
    assert rates == sorted(rates, reverse=True)
    assert all(row["memory"] <= 80e9 for row in report["best"])
    with pytest.raises(ValueError, match="in none of"):
        plan_inference(recipe("llama3-405b"), "1xH100")
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        plan_inference(recipe("llama3-8b"), "1xH100", acceptance=1.5)


def test_the_verb_prints_both_plans() -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["plan", "llama3-8b", "--cluster", "2x8xB200"])
    assert done.exit_code == 0
    assert "llama3-8b on 2x8xB200" in done.output and "do not fit in memory" in done.output
    assert "not measured on it" in done.output.replace("\n", " ")
    wanted = ["plan", "llama3-8b", "--cluster", "1xH200", "--inference", "--batch", "32", "--json"]
    row = json.loads(runner.invoke(app, wanted).output)["best"][0]
    assert row["batch"] == 32 and row["dollars"] > 0
    with pytest.raises(ValueError, match="say which machines"):
        runner.invoke(app, ["plan", "llama3-8b", "--inference"], catch_exceptions=False)
