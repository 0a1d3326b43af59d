"""Sinks: what is written, and what a missing package says."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from moebius.config import from_json, to_json
from moebius.monitor.runs import read_metrics
from moebius.monitor.sinks import (
    JsonLines,
    SinkConfig,
    TensorBoard,
    TensorBoardConfig,
    WandBConfig,
    scalars,
)

LINE = {
    "step": 3,
    "loss": 2.5,
    "skipped": 0,
    "loss_hex": (2.5).hex(),
    "layers": {"0": {"load_cv": 0.25, "load": [0.25, 0.75], "r_g": None}},
    "hidden_rms": [1.0, math.inf],
    "alarms": ["text"],
}


def test_json_lines_are_whole_at_once_and_finite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    sink.write(LINE)
    sink.write({"step": 4, "loss": math.nan, "layers": {"0": {"load": (-math.inf, 1)}}})
    first, second = path.read_text().splitlines()
    sink.close()
    assert json.loads(first) == LINE | {"hidden_rms": [1.0, None]}
    assert json.loads(second) == {"step": 4, "loss": None, "layers": {"0": {"load": [None, 1]}}}


def test_json_lines_go_on_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    sink = JsonLines(path)
    sink.write({"step": 2})
    sink.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_scalars_are_flat_and_finite() -> None:
    assert scalars(LINE) == {
        "loss": 2.5,
        "skipped": 0.0,
        "layers/0/load_cv": 0.25,
        "layers/0/load/0": 0.25,
        "layers/0/load/1": 0.75,
        "hidden_rms/0": 1.0,
    }


@pytest.mark.parametrize("name", sorted(SinkConfig.TABLE))
def test_every_sink_goes_through_json(name: str) -> None:
    config = from_json(SinkConfig, {"use": name})
    assert to_json(config)["use"] == name
    assert from_json(SinkConfig, to_json(config)) == config


@pytest.mark.parametrize(
    ("package", "config"), [("tensorboard", TensorBoardConfig()), ("wandb", WandBConfig())]
)
def test_a_missing_package_says_what_to_install(
    package: str, config: SinkConfig, tmp_path: Path
) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=rf"{package} is not .*pip install 'moebius\[track\]'"):
        config.build(tmp_path, "run")


def test_tensorboard_writes_what_its_own_reader_reads(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import (  # pyright: ignore[reportMissingImports]
        event_accumulator,
    )

    sink = TensorBoardConfig().build(tmp_path, "run")
    assert isinstance(sink, TensorBoard)
    sink.write(LINE)
    sink.write(LINE | {"step": 4, "loss": 2.25})
    sink.close()
    events = event_accumulator.EventAccumulator(
        str(tmp_path / "tensorboard"), size_guidance={event_accumulator.TENSORS: 0}
    )
    events.Reload()
    found = [
        (event.step, float(event.tensor_proto.float_val[0])) for event in events.Tensors("loss")
    ]
    assert found == [(3, 2.5), (4, 2.25)]
    assert "layers/0/load_cv" in events.Tags()["tensors"]


def test_a_missing_package_is_said_before_a_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WandBConfig, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"no_such_package .*pip install 'moebius\[track\]'"):
        WandBConfig().check()
