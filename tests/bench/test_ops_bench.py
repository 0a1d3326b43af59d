"""The benchmarks of single ops: every row is there, agrees, and a wrong backend gets no ratio."""

from typing import Any

import pytest
import torch

from moebius.bench.attention import bench_attention
from moebius.bench.compare import Candidate, compare, ratios
from moebius.bench.loss import bench_loss
from moebius.bench.moe import DENSE, LAYER, LOADS, bench_moe, loaded, shape_of
from moebius.bench.padded import experts_padded
from moebius.bench.table import markdown, print_result
from moebius.ops.experts import BACKENDS as EXPERTS
from moebius.ops.experts import experts_naive
from moebius.ops.loss import BACKENDS as LOSSES

from ..running import Place

pytestmark = pytest.mark.usefixtures("one_thread")
WHERE = {"device": "cpu", "precision": "fp32", "repeats": 1, "matmul_flops": 1e9}
SHAPE = "64x32x16x8x2"
CPU, FP32 = torch.device("cpu"), torch.float32


def timed(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows that ran, by name; those that did not say why."""
    for row in result["rows"]:
        assert "seconds" in row or "does not run here" in row["notes"][-1]
    ran = [row for row in result["rows"] if "seconds" in row]
    for row in ran:
        assert row["tokens_per_second"] > 0 and row["peak_memory_bytes"] >= 0
    return {row["name"]: row for row in ran}


def test_moe_has_every_backend_beside_the_dense_swiglu() -> None:
    result = bench_moe([SHAPE], ["zipf"], **WHERE)
    assert {row["name"] for row in result["rows"]} == {DENSE, LAYER, "padded", *EXPERTS}
    rows = timed(result)
    assert {DENSE, LAYER, "naive", "segments", "padded"} <= rows.keys()
    for name, row in rows.items():
        assert row["agrees"] is (None if name == DENSE else True), name
        assert row["over_dense"] == pytest.approx(row["seconds"] / rows[DENSE]["seconds"])
    assert rows["padded"]["error"] < 1e-5 and "gflops" in rows[DENSE]
    assert f"{SHAPE} zipf" in markdown(result)


def test_a_wrong_backend_is_timed_and_gets_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPERTS, "wrong", lambda *args: experts_naive(*args) * 1.01)
    rows = timed(bench_moe([SHAPE], ["uniform"], **WHERE))
    assert rows["wrong"]["error"] == pytest.approx(0.01, rel=0.01)
    assert rows["wrong"]["agrees"] is False and "over_dense" not in rows["wrong"]


def test_a_wrong_gradient_is_seen() -> None:
    inputs = [torch.randn(4, 4)]

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * (x - x.detach())

    both = {"right": Candidate(lambda x: x * 1.0, inputs), "wrong": Candidate(scaled, inputs)}
    rows = compare("", both, "right", CPU, FP32, tokens=4, flops=0, repeats=1)
    ratios(rows, "right", "over_naive", faster=True)
    assert rows[0]["over_naive"] == 1 and rows[1]["error"] == pytest.approx(0.1, rel=1e-3)
    assert rows[1]["agrees"] is False and "over_naive" not in rows[1]


def test_loads_choose_each_expert_once_a_token_and_zipf_is_skewed() -> None:
    shape = shape_of("512x8x8x16x3")
    most = {}
    for load in LOADS:
        index_NS = loaded(shape, load)
        assert (index_NS.sort(-1).values.diff(dim=-1) > 0).all()
        count_E = torch.bincount(index_NS.flatten(), minlength=shape.E)
        most[load] = float(count_E.max() / count_E.double().mean())
    assert most["uniform"] < 1.5 and most["zipf"] > 2.5


def test_padded_refuses_biases() -> None:
    x, index = torch.randn(3, 4), torch.zeros(3, 1, dtype=torch.int64)
    weights = (torch.ones(3, 1), torch.randn(2, 6, 4), torch.randn(2, 4, 3))
    with pytest.raises(ValueError, match="has no biases"):
        experts_padded(x, index, *weights, torch.zeros(2, 6))


def test_attention_agrees_and_packed_rows_have_no_ratio_to_what_ignores_them() -> None:
    result = bench_attention(["2x32x4x2x16x8"], (1, 4), **WHERE)
    whole, packed = result["rows"][:3], result["rows"][3:]
    assert [row["name"] for row in whole] == ["naive", "in use", "torch sdpa, causal"]
    assert all(row["agrees"] and row["over_naive"] for row in whole)
    assert [row["agrees"] for row in packed] == [True, True, None]
    assert "over_naive" not in packed[2] and packed[1]["over_naive"]
    assert all(row["seconds"] > 0 for row in result["rows"])


def test_loss_has_every_backend_and_torch() -> None:
    rows = timed(bench_loss(["64x32x128"], **WHERE))
    assert {"naive", "chunked", "in use", "torch cross_entropy"} <= rows.keys()
    assert set(LOSSES) >= {name for name in rows if "torch" not in name and name != "in use"}
    assert all(row["agrees"] and row["over_naive"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["moe", "--shape", "64x32"], "'64x32' is no shape; write NxDxFxExS"),
        (["moe", "--shape", "64x32x16x2x4"], "selects 4 of 2 experts"),
        (["moe", "--load", "even"], "load 'even' is none of uniform, zipf"),
        (["loss", "--precision", "fp12"], "precision 'fp12' is none of bf16, fp32, fp64"),
        (["attention", "--device", "gpu"], "device 'gpu' is none of auto, cpu, cuda"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(place: Place, arguments: list[str], said: str) -> None:
    assert said in place.cli("bench", *arguments).error


def test_printed_forms(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "loss", "--shape", "64x32x128", "--repeats", "1"]
    arguments += ["--precision", "fp32", "--matmul-flops", "1e9"]
    result = place.cli(*arguments, "--json").data()
    assert result["rows"] and result["dtype"] == "float32"
    assert "| --- |" in place.cli(*arguments, "--markdown").out
    print_result(result, False, False)
    out = capsys.readouterr().out
    assert "plain products" in out and "torch cross_entropy" in out
