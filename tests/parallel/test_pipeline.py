"""Pipelines against one process, by every schedule; what they refuse; their checkpoints.

`tower` has a tied embedding and a predicted second token, so its last stage uses the embedding of
the first; `column` is the same without either, for the schedule that divides a backward.
"""

import dataclasses
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moebius.model.stage import divided, stage_of, stages_of
from moebius.parallel.config import Pipe
from moebius.recipes import recipe as published

from ..running import RECIPES, UNJUDGED, Place
from .ranks import launch
from .test_data import check
from .test_reshard import check_equal, train

EXACT = ["precision=fp64", "micro_batch=1"]
TWO = [{"pp": 2}, {"pp": 2, "schedule": "interleaved"}]
FOUR = [{"pp": 2}, {"pp": 2, "ep": 2}, {"pp": 2, "tp": 2}, {"pp": 2, "dp_replicate": 2}, {"pp": 4}]


def test_two_ranks_equal_one_process_in_fp64(tmp_path: Path) -> None:
    cases = [
        ["tower", EXACT, 3, TWO],
        ["tower", [*EXACT, "recompute=true"], 1, TWO],
        ["column", EXACT, 3, [{"pp": 2, "schedule": "zbv"}]],
    ]
    found = launch(2, "data_worker.py", tmp_path / "found.json", json.dumps(cases))
    assert len(found) == 5
    check(found, 1e-10)


def test_with_other_degrees_in_fp64(tmp_path: Path) -> None:
    cases = [
        ["tower", EXACT, 2, FOUR],
        ["pattern", EXACT, 2, [{"pp": 2, "cp": 2}]],
        ["column", EXACT, 2, [{"pp": 2, "ep": 2, "schedule": "zbv"}]],
    ]
    found = launch(4, "data_worker.py", tmp_path / "found.json", json.dumps(cases))
    assert len(found) == len(FOUR) + 2
    check(found, 1e-10)


@pytest.fixture(scope="module")
def fields(corpus: Path, cache: Path) -> list[str]:
    where = [f"data.path={corpus}", f"data.cache={cache}"]
    return [f"{RECIPES}:tower", *where, "precision=fp64", "steps=6", "measure_every=2", UNJUDGED]


def test_its_checkpoints_go_on_with_other_layouts(tmp_path: Path, fields: list[str]) -> None:
    """Two stages, then one process, then four ranks; every line of metrics says the same."""
    train(1, *fields, "--out", tmp_path / "whole")
    run = tmp_path / "moved"
    train(2, *fields, "parallel.pp=2", "stop_at=2", "--out", run)
    train(1, "--resume", run, "stop_at=4", "parallel.pp=1")
    train(4, "--resume", run, "stop_at=none", "parallel.pp=2", "parallel.ep=2")
    check_equal(tmp_path / "whole", run, 6)
    for old, new in zip(lines(tmp_path / "whole"), lines(run), strict=True):
        assert flat(new) == pytest.approx(flat(old), rel=1e-6, abs=1e-9)


def lines(run: Path) -> list[dict[str, Any]]:
    """The metrics, but for the clock."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_second", "mfu", "loss_hex", "alarms")
    return [{key: x for key, x in line.items() if key not in timed} for line in found]


def flat(value: Any, path: str = "") -> dict[str, float | None]:
    """Every number by the path to it."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: x for key, one in pairs for k, x in flat(one, f"{path}/{key}").items()}
    return {path: value}


@pytest.mark.parametrize(
    ("recipe", "overrides", "said"),
    [
        ("tower", ["batch=5"], "a rank's 5 sequences, 2 a micro-batch, cannot fill a pipeline"),
        ("tower", ["micro_batch=4"], "8 sequences, 4 a micro-batch, cannot fill a pipeline of 4"),
        ("tiny", [], "a pipeline of 2 stages needs as many units of layers, but this model has 1"),
        ("tower", ["parallel.schedule=zbv"], "torch cannot do with embed.w_VD, which the last"),
        ("column", ["parallel.schedule=zbv", "recompute=true"], "cannot do with recompute"),
        ("column", ["parallel.schedule=interleaved", "parallel.stages_per_rank=1"], "at least 2"),
        ("column", ['qk_clip={"threshold": 9}'], "over whole sequences; use parallel.pp=1"),
        ("column", ["parallel.pp=1", "parallel.tp=2", "precision=mxfp4"], "use parallel.tp=1 or"),
    ],
)
def test_what_no_pipeline_can_do_is_refused(
    recipe: str, overrides: list[str], said: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before ranks meet and anything is written."""
    ranks = 4 if "micro_batch=4" in overrides else 2
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    fields = [f"parallel.pp={ranks}", "batch=8", *overrides]
    done = place.cli("train", f"{RECIPES}:{recipe}", *fields, "--out", "run")
    assert said in done.error
    assert not (place.folder / "run").exists()


def units(*sizes: int) -> list[range]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_way_to_share_units_has_a_cheaper_dearest_stage(seed: int) -> None:
    """Against all of them; whole units, in order."""
    draw = random.Random(seed)
    sizes = [draw.randint(1, 4) for _ in range(draw.randint(1, 9))]
    costs = [draw.choice((1.0, 2.0, 7.0)) * size for size in sizes]
    count = draw.randint(1, len(sizes))
    stages = stages_of(units(*sizes), costs, count)
    assert [unit for stage in stages for unit in stage] == units(*sizes)
    assert len(stages) == count and all(stages)

    def dearest(cuts: Sequence[int]) -> float:
        return max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, len(sizes))))

    taken = list(itertools.accumulate(map(len, stages)))[:-1]
    every = itertools.combinations(range(1, len(sizes)), count - 1)
    assert dearest(taken) == pytest.approx(min(map(dearest, every)))


def test_the_stage_with_the_head_has_fewer_layers() -> None:
    """Llama 3 405B's costs as much as two thirds of a layer; on narrow layers it costs many."""
    run = published("llama3-nano")
    model = dataclasses.replace(run.model, layers=8 * run.model.layers[:1])
    lengths = [
        [sum(map(len, stage)) for stage in divided(model.build(vocab), 2, run.sequence_length)]
        for vocab in (32, 32_768)
    ]
    assert lengths[0] == [4, 4]
    assert lengths[1] == [7, 1]


def test_what_a_stage_holds() -> None:
    stages = stages_of(units(1, 2, 1), [1.0, 2.0, 1.0], 3)
    names = ["embed.w_VD", "layers.0.ffn.w", "layers.2.a", "layers.3.b", "head.w_VD", "ends.0.x"]
    assert [stage_of(name, stages) for name in names] == [0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("pipe", "held"),
    [
        (Pipe(3), [[0], [1], [2]]),
        (Pipe(2, "interleaved", 3), [[0, 2, 4], [1, 3, 5]]),
        (Pipe(3, "zbv", 2), [[0, 5], [1, 4], [2, 3]]),
    ],
)
def test_the_stages_of_each_rank(pipe: Pipe, held: list[list[int]]) -> None:
    assert [pipe.held_by(rank) for rank in range(pipe.ranks)] == held
