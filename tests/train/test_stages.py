"""Stages: switched at exact token counts, resumed anywhere, data and counts following.

The stages here are two: from step 4 on sequences twice as long, as many tokens a step; from step 7
on four times as long and three of them a step.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from moebius import checkpoint
from moebius.config import override, to_json
from moebius.data.loader import Loader
from moebius.data.prepare import prepare
from moebius.model.count import count_config
from moebius.model.longer import effective_length, effective_model, with_rope_base
from moebius.recipes import recipe
from moebius.train.folder import RunFolder
from moebius.train.passes import context_of
from moebius.train.run import Run
from moebius.train.sections import loaders, sections_of
from moebius.train.session import read_run
from moebius.train.stages import Stage
from moebius.train.step import micro_rows

from ..running import RECIPES, UNJUDGED, Place, lines, losses, tree, write_corpus

TWO: tuple[tuple[int, int, int | None, float | None], ...] = (
    (512, 64, None, 1e6),
    (896, 128, 3, 1e7),
)
# In `wild` two batches of six sequences come before the first stage.
TOKENS = {"tiny": (512, 896), "pattern": (512, 896), "wild": (640, 1216)}
RAMP = {"wild": "batch_ramp=[[2, 6]]"}


def stages(*given: tuple[int, int, int | None, float | None]) -> str:
    names = ("at_tokens", "sequence_length", "batch", "rope_base")
    return "stages=" + json.dumps([dict(zip(names, one, strict=True)) for one in given])


def two(name: str) -> list[str]:
    """The overrides that give a recipe its two stages."""
    first, second = TOKENS[name]
    both = [(first, *TWO[0][1:]), (second, *TWO[1][1:])]
    return [RAMP.get(name, "batch_ramp=[]"), stages(*both)]


@pytest.fixture(scope="module", params=["tiny", "pattern", "wild"])
def whole(request: pytest.FixtureRequest, place: Place) -> tuple[str, Path]:
    """A recipe, and its run through both stages that nothing stopped, all checkpoints kept."""
    name = request.param
    fields = ("checkpoint_every=1", "keep_checkpoints=20", UNJUDGED)
    return name, place.train(f"{name}-whole", *two(name), *fields, recipe=name)


@pytest.fixture(scope="module")
def tiny(place: Place) -> Path:
    """The same of `tiny`, apart, so that each test can run alone."""
    fields = ("checkpoint_every=1", "keep_checkpoints=20", UNJUDGED)
    return place.train("tiny-both", *two("tiny"), *fields)


@pytest.fixture(scope="module")
def finished(place: Place) -> Path:
    """A run of all 12 steps without any stage. Copied, never changed."""
    return place.train("finished", UNJUDGED)


@pytest.fixture
def ended(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_stopped_across_and_inside_stages_is_exact(whole: tuple[str, Path], place: Place) -> None:
    name, run = whole
    other = place.train(f"{name}-stopped", *two(name), "stop_at=3", recipe=name)
    for stop in ("4", "6", "7", "9", "none"):
        done = place.cli("train", "--resume", other, f"stop_at={stop}", UNJUDGED)
        assert done.code == 0, done.err
    assert losses(other) == losses(run)
    same = [checkpoint.load(checkpoint.complete(one / "checkpoints")[-1]) for one in (run, other)]
    assert same[0][0].keys() == same[1][0].keys()
    assert all(torch.equal(x, same[1][0][key]) for key, x in same[0][0].items())
    kinds = [(line["step"], line["kind"]) for line in lines(other, "events.jsonl")]
    # Both stages were entered by a resume, none while it ran.
    assert [step for step, kind in kinds if kind == "stage"] == []


def test_metrics_follow_the_stage_in_force(whole: tuple[str, Path]) -> None:
    name, run = whole
    found = lines(run)
    assert [line["sequence_length"] for line in found] == [32] * 4 + [64] * 3 + [128] * 5
    first, second = TOKENS[name]
    counts = {line["step"]: line["tokens"] for line in found}
    assert counts[4] == first and counts[7] == second and counts[12] == second + 5 * 384
    kept, _ = read_run(RunFolder.open(run))
    for line in found:
        model = effective_model(to_json(kept), line["tokens"])
        flops = count_config(model, 300, line["sequence_length"]).flops_train
        assert line["mfu"] * 1e11 == pytest.approx(line["tokens_per_second"] * flops)
    entered = [line for line in lines(run, "events.jsonl") if line["kind"] == "stage"]
    assert [line["step"] for line in entered] == [4, 7]
    assert f"({second:,} tokens)" in entered[1]["message"]
    assert "3 sequences of 128 tokens a step, rope base 1e+07" in entered[1]["message"]


@pytest.mark.parametrize(
    ("step", "length", "base"), [(3, 32, None), (4, 64, "1e6"), (8, 128, "1e7")]
)
def test_a_step_is_that_of_a_model_and_a_batch_made_by_hand(
    tiny: Path, step: int, length: int, base: str | None
) -> None:
    """From the checkpoint before the step, in a model whose base was set by its own field."""
    kept, _ = read_run(RunFolder.open(tiny))
    prepared = prepare(kept.data, kept.vocab)
    loader = Loader(prepared, 32, 4, kept.seed)
    if step >= 4:
        loader = Loader(prepared, 64, 2, kept.seed, start=loader.after(4))
    if step >= 7:
        loader = Loader(prepared, 128, 3, kept.seed, start=loader.after(7))
    batch = loader.batch(step)
    assert batch.tokens_BT.shape[1] == length
    path = next(p for p in checkpoint.complete(tiny / "checkpoints") if p.name[-1] == str(step))
    tensors, state = checkpoint.load(path)
    assert loader.tokens_until(step) == state["tokens"]
    weights = {k.removeprefix("model."): x for k, x in tensors.items() if k.startswith("model.")}
    found = {}
    for name in (base, "123"):
        field = [] if name is None else [f"model.layers.0.mixer.rope_base={name}"]
        model = override(kept, field).model.build(kept.vocab)
        model.load_state_dict(weights)
        total = model.loss(batch.tokens_BT, batch.targets_BT, context_of(batch, step)).total
        found[name] = float(total.detach()) / batch.num_targets
    line = lines(tiny)[step]
    assert line["step"] == step + 1
    assert found[base] == line["loss"] != found["123"]


PROBE = """
def evaluate(model, prepared, *, sequence_length, batch, dtype, device, seed, write):
    base = model.config.layers[0].mixer.rope_base
    return {"length": sequence_length, "batch": batch, "base": base}
"""


def test_the_evaluation_is_that_of_the_last_stage(tiny: Path, place: Place, tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    evaluation = f"evaluation={tmp_path / 'probe.py'}:evaluate"
    assert place.cli("train", "--resume", tiny, evaluation).code == 0
    summary = json.loads((tiny / "summary.json").read_text())
    assert (summary["length"], summary["batch"], summary["base"]) == (128, 3, 1e7)
    assert summary["tokens"] == 896 + 5 * 384


def test_the_plan_in_steps() -> None:
    run = _run("tiny", *two("tiny"))
    sections = sections_of(run)
    assert [(s.first_step, s.end_step, s.batch) for s in sections] == [
        (0, 4, 4),
        (4, 7, 2),
        (7, 12, 3),
    ]
    assert [s.tokens_until(s.end_step) for s in sections] == [512, 896, 896 + 5 * 384]
    bases = [s.model.layers[0].mixer.rope_base for s in sections]  # pyright: ignore
    assert bases == [10_000.0, 1e6, 1e7]
    ramped = sections_of(_run("tiny", "batch_ramp=[[2, 6], [3, 8]]", stages((704, 64, None, None))))
    assert [(s.first_step, s.batch) for s in ramped] == [(0, 4), (4, 4)]
    assert ramped[1].model == ramped[0].model
    # A base that a stage leaves out is that of the stage before.
    kept = sections_of(_run("tiny", stages((512, 64, None, 1e6), (896, 128, None, None))))
    assert kept[2].model == kept[1].model and kept[2].rope_base == 1e6


def _run(name: str, *fields: str) -> Run:
    return override(recipe(f"{RECIPES}:{name}"), fields)


def test_the_base_of_a_checkpoint_is_what_its_weights_were_trained_with() -> None:
    run = dataclasses.replace(_run("tiny"), stages=tuple(Stage(*stage) for stage in TWO))
    data = to_json(run)
    bases = {
        tokens: effective_model(data, tokens).layers[0].mixer.rope_base  # pyright: ignore
        for tokens in (0, 511, 512, 513, 896, 897, 10**9)
    }
    assert list(bases.values()) == [1e4, 1e4, 1e4, 1e6, 1e6, 1e7, 1e7]
    lengths = [effective_length(data, tokens) for tokens in bases]
    assert lengths == [32, 32, 32, 64, 64, 128, 128]
    del data["stages"]
    assert effective_model(data, 10**9) == run.model and effective_length(data, 10**9) == 32


def test_positions_that_are_none_stay_none() -> None:
    run = _run("pattern", "model.layers.1.mixer.rope_base=none")
    local, full = with_rope_base(run.model, 7e6).layers
    assert (local.mixer.rope_base, full.mixer.rope_base) == (7e6, None)  # pyright: ignore
    assert run.model.layers[0].mixer.rope_base == 10_000.0  # pyright: ignore


def test_a_micro_batch_holds_as_many_tokens_in_every_stage(place: Place, tiny: Path) -> None:
    run = _run("tiny", "micro_batch=2", *two("tiny"), *place.fields())
    loader = Loader(prepare(run.data, run.vocab), 32, 4, 0)
    rows = {}
    for length, batch in ((32, 4), (64, 4), (128, 4), (16, 4)):
        rows[length] = micro_rows(
            run, Loader(prepare(run.data, run.vocab), length, batch, 0).batch(0)
        )
    assert rows == {32: 2, 64: 1, 128: 1, 16: 4}
    assert micro_rows(dataclasses.replace(run, micro_batch=None), loader.batch(0)) == 4
    other = place.train("tiny-micro", *two("tiny"), "micro_batch=2", UNJUDGED)
    pairs = zip(lines(tiny), lines(other), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-3) for a, b in pairs)


# --- what cannot be -------------------------------------------------------------------------------


LENGTH = {"sequence_length": 64}
NOPE = '{"use": "gqa", "heads": 2, "kv_heads": 1, "head_width": 8, "rope_base": null}'


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([stages((500, 64, None, None))], "the nearest token counts that fit are 384 and 512"),
        ([stages((100, 64, None, None))], "stage 1 begins at 100 tokens, inside a step"),
        ([stages((512, 64, None, None), (600, 64, None, None))], "that fit are 512 and 640"),
        ([stages((1536, 64, None, None))], "after 12 steps, and the run has 12; raise steps above"),
        ([stages((512, 96, None, None))], "no whole number of sequences of 96; set its batch"),
        ([stages((512, 64, None, None), (512, 32, None, None))], "must rise"),
        ([stages((512, 0, None, None))], "sequence_length of a stage must be at least 1"),
        ([stages((512, 64, 0, None))], "batch of a stage must be at least 1"),
        ([stages((512, 64, None, 0.5))], "rope_base of a stage must be above 1"),
        (["batch_ramp=[[4, 8]]", stages((512, 64, None, None))], "before batch_ramp is over"),
        ([stages((512, 64, None, 1e6)), f"model.layers.0.mixer={NOPE}"], "no mixer has rotary"),
        (["stages=" + json.dumps([{"at_token": 512, **LENGTH}])], "did you mean 'at_tokens'?"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    fields: list[str], said: str, place: Place, tmp_path: Path
) -> None:
    own = Place(tmp_path, place.corpus, tmp_path / "cache")
    error = own.cli("train", f"{RECIPES}:tiny", *own.fields(*fields), "--out", "out").error
    assert said in error
    assert tree(tmp_path) == []


def test_a_router_that_never_learns_is_refused(place: Place, tmp_path: Path) -> None:
    moe = {"use": "moe", "experts": 4, "expert_width": 16, "top_k": 1}
    router = {"use": "softmax", "renormalise": True}
    field = "model.layers.0.moe=" + json.dumps({**moe, "router": router})
    error = place.cli(
        "train", f"{RECIPES}:tiny", *place.fields(field), "--out", tmp_path / "x"
    ).error
    assert "gradient" in error or "learn" in error
    assert tree(tmp_path) == []


# --- stages given at resume -----------------------------------------------------------------------


def test_stages_given_at_resume_are_those_given_at_once(tiny: Path, place: Place) -> None:
    run = place.train("given", "stop_at=3")
    first, second = TWO
    for stop, given in (("4", [first]), ("5", [first, second])):
        done = place.cli("train", "--resume", run, f"stop_at={stop}", stages(*given))
        assert done.code == 0, done.err
    assert "new plan: stage 2 from step 7 (896 tokens) on: 3 sequences of 128" in done.out
    assert "stage 1 from step 4 (512 tokens) on" in done.out
    assert "horizon" not in done.out
    assert place.cli("train", "--resume", run, "stop_at=none", UNJUDGED).code == 0
    assert losses(run) == losses(tiny)
    record = json.loads((run / "run.json").read_text())
    assert [stage["at_tokens"] for stage in record["run"]["stages"]] == [512, 896]
    assert [plan["step"] for plan in record["plans"]] == [3, 4]
    assert [len(plan["before"]["stages"]) for plan in record["plans"]] == [0, 1]
    # As the run was begun: what only runs it is not settled by a resume.
    assert record["run"]["stop_at"] == 3


def test_a_finished_run_gets_a_longer_horizon(ended: Path, finished: Path, place: Place) -> None:
    done = place.cli(
        "train", "--resume", ended, stages((1536, 64, None, 1e6)), "steps=20", "stop_at=14"
    )
    assert done.code == 0, done.err
    said = "the schedule's horizon is 20 steps, no longer 12; the learning rate of step 13 is 0.01"
    assert said in done.out and "(that of step 12 was 0)" in done.out
    assert any(said in event["message"] for event in lines(ended, "events.jsonl"))
    assert not (ended / "summary.json").exists() and (ended / "summary-00000012.json").is_file()
    assert place.cli("runs", ended.parent, "--json").data()[0]["state"] == "stopped"
    assert place.cli("train", "--resume", ended, UNJUDGED).code == 0
    found = losses(ended)
    assert list(found) == list(range(1, 21))
    assert {step: found[step] for step in range(1, 13)} == losses(finished)
    rates = [line["lr"] for line in lines(ended)]
    assert rates[11] == 0 and rates[12] == 0.01 and rates[19] == 0
    assert json.loads((ended / "summary.json").read_text())["tokens"] == 20 * 128
    # Said and done once: a further resume has nothing to change.
    assert "new plan" not in place.cli("train", "--resume", ended, UNJUDGED).out


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["steps=20"], "steps: 12 -> 20"),
        (["steps=20"], "steps may rise together with a further stage"),
        ([stages((1536, 64, None, None))], "raise steps above 12"),
        ([stages((1408, 64, None, None)), "steps=20"], "a further stage begins there"),
        ([stages((1600, 64, None, None)), "steps=20"], "are 1536 and 1664"),
        ([stages((1536, 64, None, None)), "steps=20", "optim.lr=0.1"], "optim.lr: 0.01 -> 0.1"),
        ([stages((1536, 64, None, None)), "steps=10"], "steps: 12 -> 10"),
        ([stages((1536, 64, None, None)), "steps=20", "batch=8"], "batch: 4 -> 8"),
    ],
)  # fmt: skip
def test_what_a_finished_run_cannot_become(
    fields: list[str], said: str, ended: Path, place: Place
) -> None:
    before, record = tree(ended), (ended / "run.json").read_bytes()
    assert said in place.cli("train", "--resume", ended, *fields, UNJUDGED).error
    assert tree(ended) == before and (ended / "run.json").read_bytes() == record


def test_a_stage_that_has_begun_cannot_change(place: Place) -> None:
    run = place.train("begun", *two("tiny"), "stop_at=5")
    before, record = tree(run), (run / "run.json").read_bytes()
    first, second = TWO
    for given in ([], [second], [(512, 64, None, 2e6), second], [(640, 64, None, 1e6)]):
        error = place.cli("train", "--resume", run, stages(*given), "stop_at=6").error
        assert "stage 1 began at 512 tokens and the run has 640" in error
    assert tree(run) == before and (run / "run.json").read_bytes() == record
    # What is still to come may: here the second stage begins at once.
    done = place.cli("train", "--resume", run, stages(first, (640, 128, 1, None)), "stop_at=6")
    assert done.code == 0, done.err
    assert [line["sequence_length"] for line in lines(run)] == [32] * 4 + [64, 128]


# --- another mixture ------------------------------------------------------------------------------


def mixed_fields(place: Place, *more: str) -> list[str]:
    """A run of two sources: evenly, then mostly the second, then the first one alone."""
    other = place.folder / "other"
    if not other.exists():
        write_corpus(other, 30)
    sources = [{"path": str(place.corpus)}, {"path": str(other), "max_epochs": 3.0}]
    data = json.dumps({"sources": sources, "cache": str(place.cache)})
    given = [
        {"at_tokens": 512, "sequence_length": 32, "weights": [0.25, 0.75]},
        {"at_tokens": 1024, "sequence_length": 64, "weights": [1, 0]},
    ]
    return [f"data={data}", "weights=[0.5, 0.5]", f"stages={json.dumps(given)}", UNJUDGED, *more]


def mixed_run(place: Place, out: str, *more: str) -> Path:
    done = place.cli("train", f"{RECIPES}:tiny", *mixed_fields(place, *more), "--out", out)
    assert done.code == 0, done.err
    return place.folder / out


def test_weights_change_at_exact_tokens_and_resume_exactly(place: Place) -> None:
    whole = mixed_run(place, "mixed")
    kept, record = read_run(RunFolder.open(whole))
    prepared = prepare(kept.data, kept.vocab)
    first, second, third = loaders(kept, sections_of(kept), prepared)
    assert first.after(4).taken == (256, 256)
    assert second.after(8).taken == (256 + 128, 256 + 384)
    assert third.after(12).taken == (256 + 128 + 512, 256 + 384)
    messages = [e["message"] for e in lines(whole, "events.jsonl") if e["kind"] == "stage"]
    assert [message.rpartition("weights ")[2] for message in messages] == ["0.25, 0.75", "1, 0"]
    stopped = mixed_run(place, "mixed-stopped", "stop_at=3")
    for stop in ("4", "6", "8", "9", "none"):
        done = place.cli("train", "--resume", stopped, f"stop_at={stop}", UNJUDGED)
        assert done.code == 0, done.err
    assert losses(stopped) == losses(whole)
    # Weights never change the shards: a run without them finds the same ones.
    plain = dataclasses.replace(kept, weights=(), stages=())
    assert prepare(plain.data, plain.vocab).folder == prepared.folder
    assert record["data"]["digest"] == prepared.digest


def test_weights_of_a_stage_to_come_may_be_given_at_resume(place: Place) -> None:
    run = mixed_run(place, "mixed-resumed", "stop_at=6")
    given = [
        {"at_tokens": 512, "sequence_length": 32, "weights": [0.25, 0.75]},
        {"at_tokens": 1024, "sequence_length": 32, "weights": [0.75, 0.25]},
    ]
    begun = [{**given[0], "weights": [0.5, 0.5]}, given[1]]
    error = place.cli("train", "--resume", run, f"stages={json.dumps(begun)}").error
    assert "a stage that has begun cannot change" in error
    assert "weights" in place.cli("train", "--resume", run, "weights=[1, 0]").error
    done = place.cli("train", "--resume", run, f"stages={json.dumps(given)}", UNJUDGED)
    assert done.code == 0, done.err
    assert "new plan: stage 2 from step 8" in done.out and "weights 0.75, 0.25" in done.out


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["weights=[1]"], "weights must be one for each source of the data, 2, not 1"),
        (["weights=[1, -1]"], "weights must be 0 or more and not all 0, not [1.0, -1.0]"),
        (["weights=[0, 0]"], "weights must be 0 or more and not all 0"),
        (["weights=[0, 1]", "stages=[]"], "has weight 0 from beginning to end; leave it out"),
        (["stages.1.weights=[1, 2, 3]"], "weights of stage 2 must be one for each source"),
        (["stages.0.weights=[0, 0]"], "weights of stage 1 must be 0 or more and not all 0"),
        (["steps=100", "data.sources.0.max_epochs=1"], "need 184 sequences from step 8 on and the"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    fields: list[str], said: str, place: Place, tmp_path: Path
) -> None:
    every = mixed_fields(place, *fields)
    error = place.cli("train", f"{RECIPES}:tiny", *every, "--out", tmp_path / "x").error
    assert said in error and tree(tmp_path) == []
