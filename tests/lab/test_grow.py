"""Growing a run: every tensor in its place, the stack by hand, the run that goes on."""

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moebius
from moebius import checkpoint
from moebius.checkpoint import complete
from moebius.lab.grow import grow, parse_factor
from moebius.lab.stack import check_lenders, stacked, stacked_from
from moebius.model.block.prenorm import PreNorm
from moebius.model.context import Context
from moebius.model.count import count_config
from moebius.model.ffn.dense import Dense
from moebius.model.mixers import Mixer, MixerConfig
from moebius.model.mixers.cla import CLA
from moebius.model.mixers.gqa import GQA
from moebius.model.part import Site
from moebius.monitor.compare import compare_rows, write_comparison
from moebius.monitor.report import write_report
from moebius.train.fit import continue_run, fit
from moebius.train.folder import RunFolder
from moebius.train.session import read_run
from moebius.train.stages import Stage

from .. import tiny
from ..running import Place, finished, lines, losses, tree
from .runs import dense, placed, sharing

STOP = 4


RECIPES = {"tiny": tiny.tiny, "wild": tiny.wild, "sharing": sharing}


@pytest.fixture(scope="module", params=RECIPES)
def parent(request: pytest.FixtureRequest, place: Place) -> Path:
    """A run stopped after 4 of 12 steps: Muon and a budget; AdamW and all that is random; CLA."""
    run = dataclasses.replace(RECIPES[request.param](), stop_at=STOP)
    return fit(placed(run, place), place.folder / request.param)


@pytest.fixture(scope="module")
def stack(parent: Path) -> Path:
    return grow(parent, parent.with_name(f"{parent.name}-stack"), layers=2)


@pytest.fixture(scope="module")
def simple(place: Place) -> Path:
    """A dense run stopped after 4 of 12 steps."""
    return fit(placed(dataclasses.replace(dense(), stop_at=STOP), place), place.folder / "simple")


def newest(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return checkpoint.load(complete(run / "checkpoints")[-1])


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def contents(folder: Path) -> dict[str, str]:
    """The bytes of every file, hashed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- stacking -------------------------------------------------------------------------------------


def test_every_tensor_of_the_state_is_kept_and_layers_twice(parent: Path, stack: Path) -> None:
    (old, old_counters), (new, new_counters) = newest(parent), newest(stack)
    num_layers = len(record(parent)["run"]["model"]["layers"])
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in old.items():
        kind, _, rest = name.partition(".layers.")
        if rest and kind in ("model", "optim"):
            layer, _, leaf = rest.partition(".")
            for copy in range(2):
                expected[f"{kind}.layers.{int(layer) + copy * num_layers}.{leaf}"] = tensor
        else:
            expected[name] = tensor
    assert new.keys() == expected.keys() and len(new) > len(old) > 40
    assert all(torch.equal(new[name], expected[name]) for name in expected)
    assert new_counters == old_counters and new_counters["step"] == STOP
    # There was something to keep: moments moved, and so did the biases of controllers.
    assert all(x.abs().max() > 0 for name, x in old.items() if name.endswith(("momentum", "bias")))


@torch.no_grad()
def test_the_stack_is_the_layers_applied_twice(parent: Path, stack: Path) -> None:
    old, new = moebius.load(parent)[0], moebius.load(stack)[0]
    tokens_BT = torch.randint(0, 300, (2, 19), generator=torch.Generator().manual_seed(3))
    ctx = Context.continuing(tokens_BT, 0)
    x_BTD = old.lm.embed(tokens_BT, torch.float32)
    for _ in range(2):
        lent: dict[str, torch.Tensor] = {}
        for block in old.lm.blocks():
            out = block(x_BTD, ctx, None, lent)
            x_BTD, lent = out.x_BTD, lent | out.lent
    expected_BTV = old.lm.logits(x_BTD)
    assert torch.allclose(new(tokens_BT), expected_BTV, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(old(tokens_BT), expected_BTV, rtol=1e-2, atol=1e-2)


def test_the_record_of_the_grown_run(parent: Path, stack: Path) -> None:
    old, new = record(parent), record(stack)
    run, _ = read_run(RunFolder.open(stack))
    counts = count_config(run.model, run.vocab, run.sequence_length)
    assert len(run.model.layers) == 2 * len(old["run"]["model"]["layers"])
    assert run.name == new["name"] == f"{parent.name}-grown" and run.stop_at is None
    assert (run.steps, run.seed) == (old["run"]["steps"], old["run"]["seed"])
    assert new["params_total"] == counts.total > old["params_total"]
    assert new["flops_per_token"] == counts.flops_train > old["flops_per_token"]
    assert new["fingerprint"] != old["fingerprint"]
    for name in ("precision", "threads", "data", "manifest", "matmul_flops"):
        assert new[name] == old[name]
    grown = new["grown"]
    assert grown["from"] == parent.name and (grown["step"], grown["layers"]) == (STOP, 2)
    assert (stack / "tokenizer.json").read_bytes() == (parent / "tokenizer.json").read_bytes()
    assert [path.name for path in (stack / "code").iterdir()] == [
        path.name for path in (parent / "code").iterdir()
    ]
    assert lines(stack) == lines(parent) and len(lines(stack)) == STOP
    event = lines(stack, "events.jsonl")[-1]
    assert (event["kind"], event["step"]) == ("grown", STOP)


def test_it_goes_on_exactly_and_began_where_it_said(
    parent: Path, stack: Path, tmp_path: Path
) -> None:
    """The first losses are those that the next step of either model logs; stops cost no bit."""
    whole, halted, old = (
        shutil.copytree(path, tmp_path / name)
        for path, name in ((stack, "whole"), (stack, "halted"), (parent, "old"))
    )
    continue_run(whole)
    continue_run(halted, ["stop_at=6"])
    continue_run(halted, ["stop_at=none"])
    continue_run(old, ["stop_at=5"])
    assert list(losses(whole)) == list(range(1, 13))
    assert losses(halted) == losses(whole)
    grown, first, before = record(stack)["grown"], lines(whole)[STOP], lines(old)[STOP]
    assert grown["first_loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert grown["parent_loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert abs(grown["first_loss"] - grown["parent_loss"]) > 1e-4
    assert (first["lr"], first["tokens"]) == (before["lr"], before["tokens"])
    assert lines(whole)[-1]["loss"] < first["loss"]
    assert write_report(whole).is_file()
    rows = compare_rows([old, whole])
    assert [row["steps"] for row in rows] == [5, 12]
    assert write_comparison([old, whole], tmp_path / "compare.html").is_file()


def test_a_grown_run_grows_again(simple: Path, tmp_path: Path) -> None:
    first = grow(simple, tmp_path / "first", layers=3)
    # What an imported model came with: an export needs it.
    (first / "hf").mkdir()
    (first / "hf" / "config.json").write_text("{}")
    second = grow(first, tmp_path / "second", experts=2)
    assert len(record(second)["run"]["model"]["layers"]) == 6
    assert record(second)["grown"]["before"] == record(first)["grown"]
    assert record(second)["name"] == "dense-grown-grown"
    assert (second / "hf" / "config.json").read_text() == "{}"


@dataclasses.dataclass(frozen=True)
class FirstLends(MixerConfig):
    """A mixer of which only the very first layer lends."""

    def build(self, site: Site) -> Mixer:
        return CLA(GQA(heads=4, kv_heads=2, head_width=8), borrows=site.layer > 0).build(site)


def test_layers_may_not_borrow_from_another_copy() -> None:
    good, layer = sharing().model, PreNorm(FirstLends(), Dense(8))
    with torch.device("meta"):
        check_lenders(stacked(good, 2).build(300), num_layers=2)
        model = stacked(dataclasses.replace(good, layers=2 * (layer,)), 2).build(300)
    with pytest.raises(ValueError, match=r"layers\.3 would borrow from layers\.0, of another copy"):
        check_lenders(model, num_layers=2)


def test_growth_where_a_stage_begins(place: Place, tmp_path: Path) -> None:
    """The next batch is the stage's, longer and with another rotary base, for both models."""
    stage = Stage(at_tokens=STOP * 128, sequence_length=64, rope_base=1e6)
    run = dataclasses.replace(tiny.tiny(), stages=(stage,), stop_at=STOP)
    old = fit(placed(run, place), tmp_path / "old")
    new = grow(old, tmp_path / "new", layers=2)
    for path in (old, new):
        continue_run(path, ["stop_at=5"])
    grown = record(new)["grown"]
    assert grown["first_loss"] == pytest.approx(lines(new)[STOP]["loss"], rel=1e-6)
    assert grown["parent_loss"] == pytest.approx(lines(old)[STOP]["loss"], rel=1e-6)
    assert lines(new)[STOP]["sequence_length"] == 64


def test_names_of_other_parts_are_left_alone() -> None:
    assert stacked_from("model.layers.13.mixer.w_q", 14) == "model.layers.13.mixer.w_q"
    assert stacked_from("optim.layers.15.ffn.w_down.momentum", 14).startswith("optim.layers.1.ffn")
    for name in ("model.ends.0.steps.1.block.w", "optim.embed.w_VD.first_moment", "random.cpu"):
        assert stacked_from(name, 1) == name


# --- the command's own work -----------------------------------------------------------------------


def test_what_it_says_and_where_it_puts_it(simple: Path, tmp_path: Path) -> None:
    said: list[str] = []
    before = contents(simple)
    with contextlib.chdir(tmp_path):
        paths = [grow(simple, layers=2, say=said.append) for _ in range(2)]
    assert paths == [tmp_path / "runs" / f"dense-grown-{i}" for i in (1, 2)]
    assert (
        tree(tmp_path / "runs")[0] == "dense-grown-1" and len(list(paths[0].parent.iterdir())) == 2
    )
    assert contents(simple) == before
    grown = record(paths[0])["grown"]
    assert f"first loss {grown['first_loss']:.4f}" in said[0]
    assert f"on the same batch {grown['parent_loss']:.4f} (step 5)" in said[0]
    assert f"`moebius train --resume {paths[0]}` goes on" in said[1]
    tensors = [newest(path)[0] for path in paths]
    assert all(torch.equal(x, tensors[1][name]) for name, x in tensors[0].items())


def test_metrics_of_later_steps_stay_behind(simple: Path, tmp_path: Path) -> None:
    """A run killed after its checkpoint has lines that its grown form will log anew."""
    run = shutil.copytree(simple, tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    assert lines(grow(run, tmp_path / "out", layers=2)) == lines(simple)


def test_a_finished_run_may_grow_and_says_that_it_is_over(simple: Path, tmp_path: Path) -> None:
    run = shutil.copytree(simple, tmp_path / "run")
    continue_run(run, ["stop_at=none"])
    said: list[str] = []
    out = grow(run, tmp_path / "out", layers=2, say=said.append)
    assert "all 12 steps are done" in said[0] and not (out / "summary.json").exists()


@pytest.mark.parametrize("text", ["2x", "2", " 2X "])
def test_a_factor(text: str) -> None:
    assert parse_factor(text) == 2 and parse_factor("14x") == 14


@pytest.mark.parametrize(
    "text", ["1x", "0", "x", "", "2.5x", "-2x", "2xx", "twice", 30 * "9", "٣x"]
)
def test_no_factor(text: str) -> None:
    with pytest.raises(ValueError, match=r"no whole factor of 2 or more; write --layers 2x"):
        parse_factor(text)


Wrong = dict[str, Any]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "one of --layers 2x and --experts N"),
        ({"layers": 2, "experts": 4}, "one of --layers 2x and --experts N"),
        ({"layers": 1}, "take 2x or more"),
        ({"layers": 10**9}, "are more than 10000; take a smaller factor"),
        ({"experts": 10**12}, "experts (1000000000000) must be at most 10000"),
        ({"experts": 1}, "experts (1) must be at least 2"),
        ({"experts": 4, "top_k": 5}, "top_k (5) must lie in 2..4"),
        ({"experts": 4, "top_k": 1}, "its router no gradient"),
    ],
)
def test_wrong_orders(how: Wrong, said: str, simple: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        grow(simple, tmp_path / "out", **how)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert tree(tmp_path) == []


def _no_run(run: Path, out: Path) -> None:
    (run / "run.json").unlink()


def _no_checkpoint(run: Path, out: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def _damaged(run: Path, out: Path) -> None:
    path = complete(run / "checkpoints")[-1] / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _imported(run: Path, out: Path) -> None:
    """Weights alone, as an import leaves them."""
    tensors, counters = newest(run)
    weights = {name: x for name, x in tensors.items() if name.startswith("model.")}
    shutil.rmtree(run / "checkpoints")
    checkpoint.save(run / "checkpoints", 0, weights, counters | {"weights_only": True}, keep=1)


def _other_data(run: Path, out: Path) -> None:
    data = record(run)
    data["data"]["digest"] = "0"
    (run / "run.json").write_text(json.dumps(data))


def _other_model(run: Path, out: Path) -> None:
    data = record(run)
    data["run"]["model"]["layers"][1]["ffn"]["hidden"] = 56
    (run / "run.json").write_text(json.dumps(data))


def _not_empty(run: Path, out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")


def _a_file(run: Path, out: Path) -> None:
    out.write_text("mine")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_no_run, "there is no run in"),
        (_no_checkpoint, "has no checkpoint yet"),
        (_damaged, "no intact checkpoint in"),
        (_imported, "train it for a step before it grows"),
        (_other_data, "the data has changed since"),
        (_other_model, "does not fit model.layers.1.ffn.w_gate_up"),
        (_not_empty, "is not empty"),
        (_a_file, "is not a folder"),
    ],
)
def test_what_cannot_grow_is_refused_before_anything_is_written(
    change: Callable[[Path, Path], None], said: str, simple: Path, tmp_path: Path
) -> None:
    run, out = shutil.copytree(simple, tmp_path / "run"), tmp_path / "out"
    change(run, out)
    before = contents(tmp_path), tree(tmp_path)
    with pytest.raises(ValueError) as error:
        grow(run, out, layers=2)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert (contents(tmp_path), tree(tmp_path)) == before


# --- interrupted ----------------------------------------------------------------------------------


def test_ctrl_c_before_it_writes(simple: Path, tmp_path: Path) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grow(simple, tmp_path / "out", layers=2, say=interrupt)
    assert tree(tmp_path) == []


@contextlib.contextmanager
def largest_file(kilobytes: int) -> Iterator[None]:
    """No file may grow beyond a size, as on a disk that is full."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("kilobytes", [1, 64])
def test_a_full_disk_leaves_nothing(kilobytes: int, simple: Path, tmp_path: Path) -> None:
    with largest_file(kilobytes), pytest.raises((ValueError, OSError), match=r"too large|cannot"):
        grow(simple, tmp_path / "out", layers=2)
    assert tree(tmp_path) == []
    grow(simple, tmp_path / "out", layers=2)
    assert moebius.load(tmp_path / "out")[0].lm.blocks()


def test_ctrl_c_while_it_writes(simple: Path, tmp_path: Path) -> None:
    """The folder is not there, or it is whole; what stood aside is gone."""
    call = f"grow({str(simple)!r}, {str(tmp_path / 'out')!r}, layers=2, say=say)"
    code = f"""
from moebius.lab.grow import grow
def say(text):
    print(text, flush=True)
{call}
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    # The losses are the last that it says before it writes.
    assert child.stdout.readline().startswith("first loss")
    child.send_signal(signal.SIGINT)
    done = finished(child)
    assert done.code == 0 or "KeyboardInterrupt" in done.err
    left = [path.name for path in tmp_path.iterdir()]
    assert left in ([], ["out"]) and (left or done.code)
    if left:
        assert newest(tmp_path / "out")[1]["step"] == STOP


def test_what_a_killed_growth_left_is_swept_and_one_at_work_is_not(
    simple: Path, tmp_path: Path
) -> None:
    dead, alive = tmp_path / ".growing-dead", tmp_path / ".growing-alive"
    dead.mkdir()
    (dead / "metrics.jsonl").write_text("{}\n")
    alive.mkdir()
    with RunFolder(alive).lock():
        grow(simple, tmp_path / "out", layers=2)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".growing-alive", "out"]
