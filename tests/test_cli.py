"""Bad input through the command line: one line that helps, exit code 2, and nothing written.

And the other verbs: what they print as data, and what they say of what is not there.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from moebius.recipes import CURATIONS, TABLE

from .running import RECIPES, Outcome, Place, finished, lines, tree

TINY = f"{RECIPES}:tiny"
MIXER = "model.layers.0.mixer"
MOE = "model.layers.0.moe"


@pytest.fixture
def empty(corpus: Path, tmp_path: Path) -> Place:
    """A place where nothing was ever written."""
    return Place(tmp_path, corpus, tmp_path / "cache")


def refused(place: Place, *arguments: str | Path) -> str:
    """The error of a command that writes nothing at all."""
    before = tree(place.folder)
    error = place.cli(*arguments).error
    assert tree(place.folder) == before
    assert "Traceback" not in error
    return error


# --- unknown names and wrong types ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("stepss=3", "Run has no field 'stepss'; did you mean 'steps'?"),
        ("optim.lrr=3", "OptimConfig has no field 'lrr'; did you mean 'lr'?"),
        (f"{MIXER}.head=3", "MLA has no field 'head'; did you mean 'heads'?"),
        (f"{MIXER}=gqaa", "unknown mixer 'gqaa'; did you mean 'gqa'?"),
        (f"{MIXER}=gqa", f"{MIXER}: GQA needs heads, kv_heads, head_width; write"),
        (f"{MIXER}=nowhere.py:Mine", "there is no file"),
        (f"{MIXER}=moebius.model.ffn.dense:Dense", "is not a mixer"),
        (f'{MOE}.balance=["bugdet"]', "unknown balance rule 'bugdet'; did you mean 'budget'?"),
        ("optim.schedule=wsdd", "unknown schedule 'wsdd'; did you mean 'wsd'?"),
        ("optim.roles.experts.lr=1", "there is no 'experts'; did you mean 'expert'?"),
        ("model.layers.7.mixer=gqa", "'7' is not an index below 1, nor *"),
        ("optim.lr=fast", "optim.lr: expected a number, got 'fast'"),
        ("optim.lr=nan", "optim.lr: expected a number, got 'nan'"),
        ("optim.lr=-1", "must not be negative"),
        ("steps=1e3", "steps: expected an integer, got '1e3'"),
        ("steps=0", "steps must be at least 1"),
        ("model.tied=perhaps", "model.tied: expected true or false, got 'perhaps'"),
        ("precision=fp16", "precision: 'fp16' is not valid; did you mean 'fp64'?"),
        ("data.max_bytes=lots", "data.max_bytes: expected an integer, got 'lots'"),
        ("optim.schedule.warmup=soon", "'soon' is not a duration"),
        ("optim.schedule.warmup=200", "warmup 200 and decay 2 steps do not fit into a run of 12"),
        ("evaluation=moebius.eval.final:evaluat", "has no 'evaluat'; did you mean 'evaluate'?"),
        ("matmul_flops=0", "matmul_flops must be above 0"),
        ("steps", "'steps' is not an override; write field.name=value"),
        ("=3", "'=3' is not an override"),
        ("device=tpu", "'tpu' is not valid"),
    ],
)
def test_fields(field: str, said: str, empty: Place) -> None:
    assert said in refused(empty, "train", TINY, *empty.fields(field))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("quickstrat", "unknown recipe 'quickstrat'; did you mean 'quickstart'?"),
        ("quickstart.py", "or write file.py:function"),
        ("nowhere.py:run", "there is no file"),
        (f"{RECIPES}:tny", "has no 'tny'; did you mean 'tiny'?"),
        (f"{RECIPES}:SOURCE", "is no recipe"),
        ("os:getcwd", "is no recipe"),
        ("json:dumps", "is no recipe"),
        ("platform:python_version", "returned str, not a moebius.train.run.Run"),
        ("no.such.module:run", "there is no module 'no.such.module'"),
        ("./tiny:run", "'./tiny' is neither a module nor a .py file"),
        ("..:run", "'..' is neither a module nor a .py file"),
        (":run", "'' is neither a module nor a .py file"),
        ("data.path=here", "unknown recipe 'data.path=here'"),
    ],
)
def test_recipes(recipe: str, said: str, empty: Place) -> None:
    assert said in refused(empty, "train", recipe)


# --- dims that do not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "field", "said"),
    [
        ("pattern", f"{MIXER}.kv_heads=3", "heads (4) must be a multiple of kv_heads (3)"),
        ("pattern", f"{MIXER}.kv_heads=0", "heads (4) must be a multiple of kv_heads (0)"),
        ("pattern", f"{MIXER}.head_width=7", "head_width (7) must be even"),
        ("pattern", f"{MIXER}.window=0", "window (0) must be at least 1"),
        ("pattern", "model.layers.1.ffn.top_k=5", "top_k"),
        ("pattern", "model.layers.1.ffn.top_k=0", "top_k"),
        ("tiny", f"{MOE}.top_k=13", "top_k"),
        ("tiny", f"{MOE}.ffn_per_token=4", "ffn_per_token (4.0) must lie in 0..top_k (3)"),
        ("tiny", f"{MOE}.zero_experts=0", "needs zero_experts"),
        ("tiny", f"{MOE}.balance.1.groups=3", "groups (3) must divide the 8 FFN experts"),
        ("tiny", f"{MIXER}.rope_width=7", "rope_width (7) must be even"),
        ("tiny", f"{MIXER}.q_rank=none", "scale_correction needs q_rank"),
        ("tiny", f"{MIXER}.kv_rank=0", "at least 1"),
        ("tiny", f"{MIXER}.heads=-2", "at least 1"),
        ("tiny", "model.width=0", "at least 1"),
        ("tiny", "model.layers=[]", "model.layers is empty"),
        ("tiny", "vocab=100", "vocab must be at least 257"),
        ("tiny", "micro_batch=0", "micro_batch must be at least 1"),
        ("tiny", "batch_ramp=[[3,0]]", "at least 1"),
        ("tiny", "batch_ramp=[[5,8],[3,16]]", "must rise"),
    ],
)
def test_dims(recipe: str, field: str, said: str, empty: Place) -> None:
    error = refused(empty, "train", f"{RECIPES}:{recipe}", *empty.fields(field))
    assert said in error


# --- data -----------------------------------------------------------------------------------------


def test_text_that_is_not_there(empty: Place) -> None:
    def error(path: Path) -> str:
        return refused(empty, "train", TINY, f"data.path={path}", f"data.cache={empty.cache}")

    folder = empty.folder / "texts"
    assert "cannot read" in error(folder) and str(folder) in error(folder)
    folder.mkdir()
    assert "no file to read in" in error(folder) and ".jsonl" in error(folder)
    (folder / "picture.png").write_bytes(b"\x89PNG")
    assert "unknown kind of file: 1" in error(folder)
    (folder / "blank.txt").write_text(" \n")
    assert "no usable text in" in error(folder) and "looked for" in error(folder)
    (folder / "blank.txt").write_bytes(b"\xff\xfe\xff" * 100)
    assert "no usable text in" in error(folder)
    lone = empty.folder / "empty.txt"
    lone.touch()
    assert "is empty" in error(lone)


def test_text_that_cannot_be_read(empty: Place) -> None:
    text = empty.folder / "secret.txt"
    text.write_text("words " * 1000)
    text.chmod(0)
    if os.access(text, os.R_OK):
        pytest.skip("this user may read everything")
    fields = (f"data.path={text}", f"data.cache={empty.cache}")
    assert "unreadable" in refused(empty, "train", TINY, *fields)


def test_a_mixture_that_is_used_up(empty: Place) -> None:
    source = {"path": str(empty.corpus), "max_epochs": 0.1}
    data = {"sources": [source], "cache": str(empty.cache)}
    done = empty.cli("train", TINY, f"data={json.dumps(data)}", "steps=1000")
    assert "max_epochs" in done.error and not (empty.folder / "runs").exists()


# --- the run's folder -----------------------------------------------------------------------------


def test_a_place_that_cannot_be_written(empty: Place) -> None:
    (empty.folder / "file").touch()
    out = empty.folder / "file" / "run"
    assert "is not a folder" in refused(empty, "train", TINY, *empty.fields(), "--out", out)
    assert "is not a folder" in refused(empty, "train", TINY, *empty.fields(), "--out", "file")
    (empty.folder / "runs").touch()
    assert "is not a folder" in refused(empty, "train", TINY, *empty.fields())


def test_a_folder_without_the_right_to_write(empty: Place) -> None:
    locked = empty.folder / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write everywhere")
    out = locked / "run"
    assert "cannot be written" in refused(empty, "train", TINY, *empty.fields(), "--out", out)
    assert "cannot be written" in refused(empty, "train", TINY, *empty.fields(), "--out", locked)


def test_a_place_that_is_taken(empty: Place) -> None:
    taken = empty.folder / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    error = refused(empty, "train", TINY, *empty.fields(), "--out", taken)
    assert "is not empty; go on with its run by --resume, or choose another --out" in error


# --- verbs ----------------------------------------------------------------------------------------


def test_train_alone_and_resume_of_nothing(empty: Place) -> None:
    assert "say which recipe to train, or --resume RUN" in refused(empty, "train")
    assert "there is no run in" in refused(empty, "train", "--resume", "missing")
    both = refused(empty, "train", "--resume", "missing", "--out", "there")
    assert "leave out --out" in both


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "missing"),
        ("report", "missing"),
        ("compare", "missing"),
        ("compare", "missing", "missing", "--json"),
    ],
)
def test_verbs_on_what_is_no_run(arguments: tuple[str, ...], empty: Place) -> None:
    assert "missing" in refused(empty, *arguments)
    (empty.folder / "missing").mkdir()
    assert "no run.json" in refused(empty, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("trian",),
        ("sample",),
        ("compare",),
        ("train", TINY, "--outt", "x"),
        ("sample", "x", "--num-tokens", "many"),
        ("data",),
        ("bench", "stepp"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], empty: Place) -> None:
    done = empty.cli(*arguments)
    assert done.code == 2 and tree(empty.folder) == []
    assert "Traceback" not in done.err


def test_no_runs(empty: Place) -> None:
    assert empty.cli("runs", "--json").data() == []
    assert empty.cli("runs").code == 0


def test_recipes_are_listed(empty: Place) -> None:
    rows = empty.cli("recipes", "--json").data()
    assert {row["name"] for row in rows} == {*TABLE, *CURATIONS}
    assert all(row["what"] for row in rows)
    assert "quickstart" in empty.cli("recipes").out


def test_runs_are_numbered_and_odd_ones_listed(place: Place) -> None:
    for number in (1, 2):
        done = place.cli("train", TINY, *place.fields("stop_at=1"))
        assert done.code == 0 and (place.folder / f"runs/tiny-{number}/run.json").exists()
    odd = place.folder / "runs" / "[bold]odd"
    shutil.copytree(place.folder / "runs" / "tiny-1", odd)
    (odd / "run.json").write_text("[]")
    rows = place.cli("runs", "--json").data()
    assert [row["state"] for row in rows] == ["damaged", "stopped", "stopped"]
    assert rows[0]["problem"].endswith("expected a JSON object")
    assert "[bold]odd" in place.cli("runs").out


def test_inspect(place: Place) -> None:
    fields = (TINY, *place.fields())
    found = place.cli("data", "inspect", *fields, "--json").data()
    assert found["sources"][0]["train"]["documents"] > 0
    shown = place.cli("data", "inspect", *fields)
    assert shown.code == 0 and shown.out


def test_sampling_options(place: Place, reference: Path) -> None:
    assert "top_p" in place.cli("sample", reference, "--top-p", "0").error
    assert "temperature" in place.cli("sample", reference, "--temperature", "-1").error
    assert place.cli("sample", reference, "--num-tokens", "0", "--prompt", "é").out == "é\n"
    assert place.cli("sample", reference, "--num-tokens", "3", "--temperature", "1e-30").code == 0


def test_a_corpus_too_small_for_the_vocabulary(tmp_path: Path, place: Place) -> None:
    """Tokens that the text never filled are in the model, and are never drawn."""
    text = tmp_path / "words.txt"
    text.write_text("ab ba\n" * 400)
    fields = (f"data.path={text}", f"data.cache={tmp_path / 'cache'}", "vocab=4096", "steps=8")
    done = place.cli("train", TINY, *fields, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert place.cli("sample", tmp_path / "run", "--temperature", "100", "--top-p", "1").code == 0


def test_an_error_in_a_process_of_its_own(empty: Place) -> None:
    done: Outcome = finished(empty.child("train", TINY, *empty.fields("optim.lr=fast")))
    assert done.error == "optim.lr: expected a number, got 'fast'"
    assert done.out == "" and tree(empty.folder) == []


def test_a_run_goes_on_after_a_refused_start(place: Place) -> None:
    """Nothing of the refused command stays behind in the way of the right one."""
    name = str(place.folder / "second-try")
    assert place.cli("train", TINY, *place.fields("steps=0"), "--out", name).code == 2
    run = place.train(name, "stop_at=1")
    assert len(lines(run)) == 1
