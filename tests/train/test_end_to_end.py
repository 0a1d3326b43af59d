"""One command trains; killed, resumed, sampled, reported: the whole way, by the real command line.

Figures are compared with a run that nothing stopped, and bits per byte with a computation of its
own: each piece of a held-out document by itself, from logits.
"""

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import moebius
from moebius import checkpoint
from moebius.config import override
from moebius.data.prepare import prepare
from moebius.data.prepared import Prepared
from moebius.infer.load import LanguageModel
from moebius.recipes import recipe
from moebius.train.folder import RunFolder
from moebius.train.session import device_of, read_run
from moebius.train.state import new_state

from ..running import RECIPES, Place, finished, lines, losses

SUMMARY = {
    "val_bits_per_byte",
    "xz_each_bits_per_byte",
    "xz_all_bits_per_byte",
    "ngram_bits_per_byte",
    "params_total",
    "params_active_mean",
    "tokens_per_second",
    "seconds",
}


@pytest.fixture(scope="module")
def run(place: Place) -> Path:
    """A run that was killed, its last line torn, and that went on to the end."""
    run = place.folder / "killed"
    child = place.training(run, "steps=40", "checkpoint_every=3")
    while child.poll() is None and not _has_lines(run, 10):
        pass
    child.kill()
    assert finished(child).code == -9
    assert not (run / "summary.json").exists()
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole[: whole[:-1].rindex(b"\n") + 30])
    done = finished(place.child("train", "--resume", run))
    assert done.code == 0, done.err
    assert "1 torn line(s) of metrics were left out" in done.out
    assert "continuing from step" in done.out
    return run


def _has_lines(run: Path, number: int) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") >= number


def test_losses_are_those_of_a_run_never_stopped(run: Path, reference: Path) -> None:
    assert list(losses(run)) == list(range(1, 41))
    assert losses(run) == losses(reference)


def test_the_run_learns(run: Path) -> None:
    found = [line["loss"] for line in lines(run)]
    assert found[0] == pytest.approx(math.log(300), abs=0.1)
    assert sum(found[-5:]) / 5 < found[0] - 0.5
    assert all(float.fromhex(line["loss_hex"]) == line["loss"] for line in lines(run))


def test_metrics_carry_the_monitors(run: Path) -> None:
    for line in lines(run):
        assert line["tokens"] == 128 * line["step"]
        assert {"bits_per_byte", "lr", "grad_norm", "tokens_per_second", "mfu"} <= line.keys()
        layer = line["layers"]["0"]
        assert {"load_cv", "max_load", "entropy", "ffn_mean", "ffn_std", "bias_max"} <= layer.keys()
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-4)
        assert line["active_min"] <= line["active_mean"] <= line["active_max"]
        assert line["alarms"] == []


def test_run_json_says_what_ran(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    assert record["precision"] == "fp32" and record["threads"] == 1
    assert record["run"]["steps"] == 40 and record["run"]["model"]["layers"][0]["use"] == "scmoe"
    assert record["versions"]["torch"] == torch.__version__
    assert record["matmul_flops"] == 1e11
    assert len(record["fingerprint"]) == 64


def test_the_summary_has_every_figure(run: Path, reference: Path, corpus: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    assert all(summary[name] > 0 for name in SUMMARY)
    assert summary["steps"] == 40 and summary["tokens"] == 40 * 128
    assert summary["skipped_steps"] == 0
    texts = [path.read_text(encoding="utf-8") for path in corpus.rglob("*") if path.is_file()]
    assert any(text.startswith(summary["sample"][:10]) for text in texts)
    assert summary["params_active_mean"] < summary["params_total"]
    other = json.loads((reference / "summary.json").read_text())
    clocks = {"seconds", "tokens_per_second"}
    same = summary.keys() - clocks
    assert {name: summary[name] for name in same} == {name: other[name] for name in same}


def test_report_compare_and_runs(run: Path, reference: Path, place: Place) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert all(f"<h2>{name}</h2>" in page for name in ("Learning", "Router", "Sample"))
    assert place.cli("report", run).out.strip() == str(run / "report.html")
    both = place.cli("compare", run, reference, "--out", "both.html", "--json").data()
    assert [row["folder"] for row in both] == [str(run), str(reference)]
    assert both[0]["val_bits_per_byte"] == both[1]["val_bits_per_byte"]
    assert "Comparison of 2 runs" in (place.folder / "both.html").read_text(encoding="utf-8")
    (listed,) = place.cli("runs", run.parent, "--json").data()
    assert listed["steps"] == 40 and listed["state"] == "finished"
    assert "finished" in place.cli("runs", run.parent).out


def test_the_sample_is_one_of_its_seed(run: Path, place: Place) -> None:
    options = ("--prompt", "def ", "--num-tokens", "40")
    outside = finished(place.child("sample", run, *options, "--seed", "3"))
    assert outside.code == 0 and outside.out.startswith("def ")
    assert place.cli("sample", run, *options, "--seed", "3").out == outside.out
    assert place.cli("sample", run, *options, "--seed", "4").out != outside.out
    greedy = [place.cli("sample", run, *options, "--temperature", "0", "--seed", seed).out
              for seed in "12"]  # fmt: skip
    assert greedy[0] == greedy[1]


def test_from_python(place: Place, reference: Path) -> None:
    """A recipe driven by hand, as in a notebook, here in a thread that no signal reaches."""
    run = override(recipe(f"{RECIPES}:tiny"), place.fields("steps=40", "stop_at=4"))
    with ThreadPoolExecutor(1) as pool:
        folder = pool.submit(moebius.fit, run, place.folder / "python").result()
    assert folder == place.folder / "python"
    assert losses(folder) == {step: losses(reference)[step] for step in (1, 2, 3, 4)}
    model, tokenizer = moebius.load(str(folder))
    tokens_BT = torch.tensor([tokenizer.encode("def while")])
    assert model(tokens_BT).shape == (*tokens_BT.shape, 300)


# --- the model itself -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(run: Path) -> LanguageModel:
    return moebius.load(run)[0]


def test_loaded_logits_are_those_of_the_trained_model(run: Path, model: LanguageModel) -> None:
    kept, _ = read_run(RunFolder.open(run))
    state = new_state(kept, device_of(kept))
    state.restore(*checkpoint.load(checkpoint.complete(run / "checkpoints")[-1]))
    tokens_BT = torch.arange(48).reshape(2, 24)
    trained = LanguageModel(state.model.eval(), torch.float32)
    logits_BTV = model(tokens_BT)
    assert logits_BTV.shape == (2, 24, 300) and logits_BTV.dtype == torch.float32
    assert torch.equal(logits_BTV, trained(tokens_BT))
    assert not logits_BTV.requires_grad


def test_bits_per_byte_computed_apart(run: Path, model: LanguageModel) -> None:
    kept, _ = read_run(RunFolder.open(run))
    prepared = prepare(kept.data, kept.vocab)
    bits, num_targets = 0.0, 0
    for piece, num_scored in _pieces(prepared, kept.sequence_length):
        logits_TV = model(torch.tensor([piece[:num_scored]]))[0].double()
        targets_T1 = torch.tensor(piece[1 : num_scored + 1])[:, None]
        bits -= float(logits_TV.log_softmax(-1).gather(1, targets_T1).sum()) / math.log(2)
        num_targets += num_scored
    texts = list(prepared.heldout_documents())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val_bytes"] == sum(len(text) for _, text in texts)
    # Every token of every text, and an end for each.
    assert summary["val_tokens"] == num_targets
    assert num_targets == len(texts) + sum(
        len(prepared.tokenizer.encode(text.decode())) for _, text in texts
    )
    assert summary["val_bits_per_byte"] == pytest.approx(bits / summary["val_bytes"], rel=1e-5)


def _pieces(prepared: Prepared, length: int) -> Iterator[tuple[list[int], int]]:
    """What a model sees of each held-out document: pieces, and how many predictions each gives.

    The texts stand one after the other, each opened by the document token, which also ends the one
    before; the row is read in windows of `length` tokens.
    """
    document = prepared.tokenizer.document
    row: list[int] = []
    for _, text in prepared.heldout_documents():
        row += [document, *prepared.tokenizer.encode(text.decode())]
    row.append(document)
    for start in range(0, len(row) - 1, length):
        window = row[start : start + length]
        window = window[: len(row) - 1 - start]
        cuts = [0, *(i for i in range(1, len(window)) if window[i] == document), len(window)]
        for first, last in pairwise(cuts):
            yield row[start + first : start + last + 1], last - first
