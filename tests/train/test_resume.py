"""What a run may change when it goes on, what it may not, and what it does with damage.

The user's own files are kept in the run's folder, so that it needs nothing outside it but its text.
"""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch

import moebius
from moebius.checkpoint import complete, load
from moebius.train.folder import RunFolder

from ..running import RECIPES, UNJUDGED, Outcome, Place, finished, lines, losses, tree


@pytest.fixture(scope="module")
def stopped(place: Place) -> Path:
    """A run stopped at step 6 of 12, with checkpoints of steps 4 and 6. Copied, never changed."""
    return place.train("stopped", "stop_at=6")


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    return place.train("whole", UNJUDGED)


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ("optim.lr=0.02", "optim.lr: 0.01 -> 0.02"),
        ("steps=20", "steps: 12 -> 20"),
        ("seed=1", "seed: 0 -> 1"),
        ("precision=bf16", "precision: 'fp32' -> 'bf16'"),
        ("batch=8", "batch: 4 -> 8"),
        ("vocab=512", "vocab: 300 -> 512"),
        ("data.path=/nowhere", "-> '/nowhere'"),
        ("data.seed=3", "data.seed: 0 -> 3"),
        ("model.layers.0.moe.top_k=4", "model.layers.0.moe.top_k: 3 -> 4"),
        ("model.ends.0.coefficient=0", "model.ends.0.coefficient: 1e-07 -> 0.0"),
        ("optim.roles.expert.lr=0.31", "optim.roles.expert.lr: 1.0 -> 0.31"),
    ],
)
def test_the_experiment_cannot_change(change: str, shown: str, run: Path, place: Place) -> None:
    before, cached = tree(run), tree(place.cache)
    error = place.cli("train", "--resume", run, change, "stop_at=none", UNJUDGED).error
    assert shown in error and "start a new run" in error
    assert (tree(run), tree(place.cache)) == (before, cached)


def test_what_only_runs_it_may_change(run: Path, whole: Path, place: Place) -> None:
    changes = ("log_every=3", "checkpoint_every=1", "keep_checkpoints=3", "data.workers=1")
    done = place.cli("train", "--resume", run, "stop_at=none", UNJUDGED, *changes)
    assert done.code == 0 and "last bit" not in done.out
    found, all_of_them = losses(run), losses(whole)
    assert list(found) == [1, 2, 3, 4, 5, 6, 9, 12]
    assert found == {step: all_of_them[step] for step in found}
    kept = [path.name for path in complete(run / "checkpoints")]
    assert kept == ["step-00000010", "step-00000011", "step-00000012"]


@pytest.mark.parametrize("change", ["micro_batch=2", "recompute=true", "threads=2"])
def test_what_may_cost_the_last_bit_says_so(change: str, run: Path, place: Place) -> None:
    done = place.cli("train", "--resume", run, "stop_at=7", change)
    assert done.code == 0
    said = f"not equal to the last bit from here on, because of {change.split('=')[0]}"
    assert said in done.out
    assert said in lines(run, "events.jsonl")[0]["message"]


def test_no_checkpoint_yet_begins_anew(run: Path, whole: Path, place: Place) -> None:
    shutil.rmtree(run / "checkpoints")
    done = place.cli("train", "--resume", run, "stop_at=none", UNJUDGED)
    assert done.code == 0 and "continuing from step 0" in done.out
    assert losses(run) == losses(whole)


# --- the text -------------------------------------------------------------------------------------


def test_changed_text_is_refused_and_put_back_is_taken(
    place: Place, corpus: Path, tmp_path: Path, whole: Path
) -> None:
    own = Place(tmp_path, shutil.copytree(corpus, tmp_path / "texts"), tmp_path / "cache")
    run = own.train("run", "stop_at=6")
    changed = own.corpus / "text-007.txt"
    text = changed.read_text(encoding="utf-8")
    changed.write_text(text + "more\n", encoding="utf-8")
    assert "the data has changed since this run began" in own.cli("train", "--resume", run).error
    changed.write_text(text, encoding="utf-8")
    shutil.rmtree(own.cache)
    assert own.cli("train", "--resume", run, "stop_at=none", UNJUDGED).code == 0
    assert losses(run) == losses(whole)


# --- damage ---------------------------------------------------------------------------------------


def damage(checkpoint: Path) -> None:
    """Flip one bit in the middle of the tensors."""
    path = checkpoint / "tensors.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over(run: Path, whole: Path, place: Place) -> None:
    newest = complete(run / "checkpoints")[-1]
    damage(newest)
    sampled = place.cli("sample", run, "--num-tokens", "3")
    assert sampled.code == 0 and "damaged checkpoint passed over" in sampled.err
    assert "damaged" not in sampled.out
    done = place.cli("train", "--resume", run, "stop_at=none", UNJUDGED)
    assert done.code == 0
    assert f"damaged checkpoint passed over: {newest}" in done.out
    assert "continuing from step 4" in done.out
    assert losses(run) == losses(whole)
    noted = [(event["step"], event["kind"]) for event in lines(run, "events.jsonl")]
    assert noted == [(4, "resumed")] * 2
    assert f"damaged checkpoint passed over: {newest}" in (run / "report.html").read_text()


def test_all_damaged_is_an_error(run: Path, place: Place) -> None:
    for checkpoint in complete(run / "checkpoints"):
        damage(checkpoint)
    before = (run / "metrics.jsonl").read_bytes()
    done = place.cli("train", "--resume", run)
    assert done.code == 2 and "no intact checkpoint in" in done.err.splitlines()[-1]
    assert (run / "metrics.jsonl").read_bytes() == before
    sampled = place.cli("sample", run)
    assert sampled.code == 2 and "no intact checkpoint in" in sampled.err.splitlines()[-1]


def test_a_damaged_record_names_the_file(run: Path, place: Place) -> None:
    (run / "run.json").write_text("{")
    assert "run.json is damaged" in place.cli("sample", run).error
    assert "run.json is damaged" in place.cli("train", "--resume", run).error


def limited(place: Place, kilobytes: int, *arguments: str | Path) -> Outcome:
    """Run a command that cannot write a file beyond a size, as on a disk that is full."""
    limits = (resource.RLIMIT_FSIZE, (kilobytes << 10, kilobytes << 10))
    child = place.child(*arguments, preparation=lambda: resource.setrlimit(*limits))
    return finished(child)


def test_a_full_disk_leaves_the_earlier_checkpoints(run: Path, whole: Path, place: Place) -> None:
    before = [path.name for path in complete(run / "checkpoints")]
    error = limited(place, 64, "train", "--resume", run, "stop_at=none", UNJUDGED).error
    assert "cannot save step 8" in error and "earlier checkpoints are intact" in error
    assert [path.name for path in complete(run / "checkpoints")] == before
    assert place.cli("train", "--resume", run, "stop_at=none", UNJUDGED).code == 0
    assert losses(run) == losses(whole)


def test_a_full_disk_at_a_line_of_metrics(whole: Path, place: Place) -> None:
    run = place.folder / "full"
    name = f"{RECIPES}:tiny"
    fields = place.fields("checkpoint_every=100", UNJUDGED)
    assert "too large" in limited(place, 12, "train", name, *fields, "--out", run).error
    assert (run / "metrics.jsonl").stat().st_size == 12 << 10
    assert place.cli("train", "--resume", run).code == 0
    assert losses(run) == losses(whole)


def test_torn_metrics_are_cut(run: Path, whole: Path, place: Place) -> None:
    path = run / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 7, "loss_hex": "0x1p0"}\n{"step": 8, "lo')
    assert place.cli("runs", run.parent, "--json").data()[0]["steps"] == 7
    assert place.cli("report", run).code == 0
    done = place.cli("train", "--resume", run, "stop_at=none", UNJUDGED)
    assert done.code == 0 and "1 torn line(s)" in done.out
    assert losses(run) == losses(whole)


def test_a_second_process_is_refused(run: Path, place: Place) -> None:
    with RunFolder.open(run).lock():
        error = place.cli("train", "--resume", run, "stop_at=none", UNJUDGED).error
    assert "another process is training in" in error
    assert place.cli("train", "--resume", run, "stop_at=7").code == 0


# --- the user's own files -------------------------------------------------------------------------

IDEA = '''
"""A mixer of my own: the stock one with half the heads, and a recipe that uses it."""
import dataclasses

from moebius.config import override
from moebius.model.mixers import MixerConfig
from moebius.model.mixers.gqa import GQA
from moebius.recipes import recipe

@dataclasses.dataclass(frozen=True)
class Half(MixerConfig):
    heads: int = 4

    def build(self, site):
        return GQA(self.heads // 2, 1, 8).build(site)

def run():
    """Mine."""
    base = recipe("TINY:tiny")
    layer = dataclasses.replace(base.model.layers[0], mixer=Half())
    model = dataclasses.replace(base.model, layers=(layer,))
    return dataclasses.replace(base, name="mine", model=model)
'''


@pytest.fixture
def idea(tmp_path: Path) -> Path:
    path = tmp_path / "my_idea.py"
    path.write_text(IDEA.replace("TINY", str(Path(__file__).parents[1] / "tiny.py")))
    return path


def test_a_run_keeps_its_own_code(idea: Path, place: Place, tmp_path: Path) -> None:
    source = idea.read_bytes()
    out = tmp_path / "mine"
    for name, stop in ((out, "stop_at=6"), (tmp_path / "whole", "stop_at=none")):
        fields = place.fields(stop)
        done = place.cli("train", f"{idea}:run", *fields, "--out", name)
        assert done.code == 0, done.err
    idea.write_text("raise RuntimeError('this file is of another day')")
    (kept,) = (out / "code").iterdir()
    assert kept.read_bytes() == source and kept.name.startswith("my_idea-")
    used = json.loads((out / "run.json").read_text())["run"]["model"]["layers"][0]["mixer"]
    assert used == {"use": f"code/{kept.name}:Half", "heads": 4}
    assert place.cli("sample", out, "--num-tokens", "3").code == 0
    idea.unlink()
    moved = out.rename(tmp_path / "moved")
    done = place.cli("train", "--resume", moved, "stop_at=none")
    assert done.code == 0, done.err
    assert losses(moved) == losses(tmp_path / "whole")
    assert moebius.load(moved)[0](torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()


def test_changed_code_is_refused(idea: Path, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    fields = place.fields("stop_at=2")
    assert place.cli("train", f"{idea}:run", *fields, "--out", out).code == 0
    (kept,) = (out / "code").iterdir()
    kept.write_bytes(kept.read_bytes().replace(b"8)", b"6)"))
    assert "is not as the run kept it" in place.cli("train", "--resume", out).error
    assert "is not as the run kept it" in place.cli("sample", out).error


def test_a_mixer_can_be_named_on_the_command_line(idea: Path, place: Place, tmp_path: Path) -> None:
    fields = place.fields("stop_at=2", f"model.layers.0.mixer={idea}:Half")
    run = place.train(str(tmp_path / "other"), *fields[2:])
    assert (run / "code").is_dir()
    error = place.cli("train", "--resume", run, f"model.layers.0.mixer={idea}:Half").error
    assert "model.layers.0.mixer.use" in error


def test_a_run_leaves_the_same_checkpoints_either_way(place: Place) -> None:
    fields = ("steps=6", "checkpoint_every=2", "keep_checkpoints=9")
    there = place.train("there", *fields, "save_in_background=false")
    beside = place.train("beside", *fields)
    one, other = (complete(run / "checkpoints") for run in (there, beside))
    assert [path.name for path in one] == [path.name for path in other] and len(one) == 3
    for before, after in zip(one, other, strict=True):
        old, new = load(before)[0], load(after)[0]
        assert old.keys() == new.keys()
        assert all(torch.equal(x, new[name]) for name, x in old.items())
