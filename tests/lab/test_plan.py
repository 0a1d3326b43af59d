"""The planner: the sources' tables, and its memory against the memory that real runs hold."""

import dataclasses
import io
import json
import math
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from moebius.config import override
from moebius.lab.memory import memory_of
from moebius.lab.plan import kv_table, plan
from moebius.lab.plan_table import render_plan
from moebius.lab.published import PUBLISHED
from moebius.model.block.prenorm import PreNorm
from moebius.model.context import Context
from moebius.model.ffn.dense import Dense
from moebius.model.lm import LM, ModelConfig
from moebius.model.mixers.cla import shared
from moebius.model.mixers.mla import MLA
from moebius.model.weight import initialise
from moebius.recipes import TABLE, recipe
from moebius.train.run import Run
from moebius.train.stages import Stage
from moebius.train.state import new_state

COUNTS = ("params_total", "params_active_min", "params_active_mean", "params_active_max")
FLOPS = ("flops_forward", "flops_backward")


@pytest.mark.parametrize("name", TABLE)
def test_every_plan_is_json_without_mismatches_and_adds_up(name: str) -> None:
    report = json.loads(json.dumps(plan(recipe(name))))
    assert report["mismatches"] == []
    assert report["published"].keys() == PUBLISHED.get(name, {}).keys()
    groups = report["groups"]
    assert sum(row["params_total"] for row in groups) == report["params_total"]
    for key in (*COUNTS[1:], *FLOPS):
        assert math.isclose(sum(row[key] for row in groups), report[key], rel_tol=1e-9), key
    assert sum(row["optimizer_bytes"] for row in groups) == report["memory"]["optimizer_bytes"]
    assert report["flops_backward"] == 2 * report["flops_forward"]
    assert report["params_body"] < report["params_total"]


def test_figures_are_of_recipes_there_are() -> None:
    assert PUBLISHED.keys() <= TABLE.keys()
    assert all(figure.source for figures in PUBLISHED.values() for figure in figures.values())


def test_longcat_flash() -> None:
    report = plan(recipe("longcat-flash"), context=131_072)
    billions = [round(report[key] / 1e9, 2) for key in COUNTS]
    assert billions == [560.66, 18.69, 27.15, 31.38]
    assert report["kv_bytes_per_token"] == 64_512 and report["kv_bytes_fixed"] == 0
    assert report["kv_bytes_at_context"] == 64_512 * 131_072
    groups = {row["group"]: row for row in report["groups"]}
    assert groups["experts"]["params_total"] == 28 * 512 * 3 * 6144 * 2048
    assert groups["experts"]["params_active_min"] == 0
    assert groups["experts"]["params_active_max"] == 28 * 12 * 3 * 6144 * 2048
    assert groups["dense"]["params_total"] == 28 * 2 * 3 * 6144 * 12_288
    assert groups["router"]["params_total"] == 28 * 768 * 6144
    assert groups["head"]["params_active_mean"] == 131_072 * 6144
    assert groups["embedding"]["params_active_mean"] == 0


def test_the_caches_of_hunyuan_large() -> None:
    table = {"mha": 1_638_400, "gqa": 163_840, "mqa": 20_480, "cla": 819_200, "gqa_cla": 81_920}
    report = plan(recipe("hunyuan-large"))
    assert report["kv_table"] == table
    assert report["kv_bytes_per_token"] == 81_920
    assert [round(report[key] / 1e9, 1) for key in COUNTS[:3]] == [388.7, 51.3, 51.3]


def test_only_gqa_with_cla_has_a_table_of_caches() -> None:
    assert kv_table(recipe("llama3-nano").model) == {}
    assert kv_table(recipe("longcat-nano").model) == {}
    latent = shared(MLA(2, None, 32, 16, 16, 16), 2)
    layers = tuple(PreNorm(mixer, Dense(32)) for mixer in latent)
    assert kv_table(ModelConfig(256, layers)) == {}


def test_states_of_fixed_length_are_told_from_those_that_grow() -> None:
    report = plan(recipe("kimi-linear-nano"))
    # Its one layer of MLA: 64 of latent and 16 of rotated key, two bytes each.
    assert report["kv_bytes_per_token"] == 2 * (64 + 16)
    assert report["kv_bytes_fixed"] > 3 * 14 * 32 * 32 * 4
    short, long = (plan(recipe("nsa-nano"), context) for context in (4096, 8192))
    grown = long["kv_bytes_at_context"] - short["kv_bytes_at_context"]
    # One key head of 32: every token of the selected branch, every 8th compressed.
    assert short["kv_bytes_per_token"] == 4 * 4 * 32 * (1 + 1 / 8) == grown / 4096


def test_what_differs_from_print_is_named() -> None:
    report = plan(override(recipe("llama3-405b"), ["vocab=128000", "model.layers.*.ffn.hidden=8"]))
    assert [line.split(":")[0] for line in report["mismatches"]] == [
        "params_total",
        "flops_train_weights",
    ]
    assert "405,850,000,000 published (arXiv 2407.21783, table 3" in report["mismatches"][0]
    row = report["published"]["params_total"]
    assert not row["agrees"] and row["deviation"] == row["ours"] / row["published"] - 1
    assert report["published"]["kv_bytes_per_token"]["agrees"]


def test_a_figure_of_one_context_is_compared_there_only() -> None:
    near, far = (plan(recipe("deepseek-v3"), context) for context in (4096, 8192))
    assert "flops_train" in near["published"] and "flops_train" not in far["published"]
    assert far["flops_forward_mixing"] == 2 * near["flops_forward_mixing"]
    with pytest.raises(ValueError, match="at least 1"):
        plan(recipe("deepseek-v3"), 0)


@pytest.mark.parametrize("name", ["quickstart", "hunyuan-nano"])
def test_states_are_planned_to_the_byte(name: str) -> None:
    run = recipe(name)
    state = new_state(override(run, ["vocab=64"]), torch.device("cpu"))
    memory = plan(override(run, ["vocab=64"]))["memory"]
    size = sum(weight.numel() for weight in state.model.parameters())
    assert memory["weights_bytes"] == memory["gradients_bytes"] == 4 * size
    held = state.optimizer.state_tensors().values()
    assert memory["optimizer_bytes"] == sum(x.numel() * x.element_size() for x in held)


def saved(model: LM, length: int, recompute: bool) -> int:
    """Bytes that autograd holds in fp32 between forward and backward, weights left out."""
    tokens_BT = torch.zeros(1, length, dtype=torch.long)
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return x

    ctx = Context.continuing(tokens_BT, 0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.loss(tokens_BT, tokens_BT, ctx, dtype=torch.float32, recompute=recompute)
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("llama3-nano", 1.0, 1.2), ("longcat-nano", 1.2, 1.45), ("qwen3-nano", 1.4, 1.65)],
)
def test_activations_are_a_floor_of_what_a_cpu_keeps(
    name: str, least: float, most: float, one_thread: None
) -> None:
    """Of torch's operators, in fp32; the kernels for bf16 keep less than they."""
    run = override(recipe(name), ["vocab=64", "precision=fp32"])
    model = run.model.build(run.vocab)
    initialise(model, 0)
    memory = memory_of(run, _on_meta(run))
    grown = saved(model, 256, False) - saved(model, 64, False)
    assert least < grown / 192 / memory.kept < most
    inputs = len(run.model.layers) * run.model.width * 4
    grown = saved(model, 256, True) - saved(model, 64, True)
    # The layers' inputs, and what final norm, hidden z-loss and loss keep in fp32.
    assert inputs < grown / 192 < inputs + 24 * run.model.width


def _on_meta(run: Run) -> LM:
    with torch.device("meta"):
        return run.model.build(run.vocab)


def test_memory_follows_precision_and_recompute() -> None:
    run = recipe("llama3-small")
    half, single, double = (
        memory_of(one, _on_meta(one))
        for one in (override(run, [f"precision={name}"]) for name in ("bf16", "fp32", "fp64"))
    )
    assert (half.casts > 0, single.casts, double.casts) == (True, 0, 0)
    assert double.weights == 2 * single.weights == 2 * half.weights
    assert double.kept == 2 * single.kept == 4 * half.kept
    assert double.optimizer == single.optimizer == half.optimizer
    with_, without = (half.training(32_768, recompute) for recompute in (True, False))
    held = (half.kept - half.kept_recompute) * 32_768 + half.casts - half.casts_recompute
    assert without - with_ == held > 0


@pytest.mark.parametrize("name", ["hunyuan-large", "kimi-linear-nano", "longcat-flash"])
def test_the_printed_plan_shows_every_part(name: str) -> None:
    report = plan(recipe(name))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_plan(report))
    text = console.export_text()
    for row in report["groups"]:
        assert row["group"].replace("_", " ") in text
    assert f"{report['kv_bytes_per_token']:,} B" in text
    assert text.count("agrees") == len(report["published"]) and "MISMATCH" not in text
    assert ("GQA + CLA" in text) == (name == "hunyuan-large")


PEAK = """
import sys
import torch
from moebius.bench.memory import Memory
from moebius.lab.plan import plan
from moebius.recipes import recipe
memory = Memory(torch.device("cpu"))
plan(recipe(sys.argv[1]))
print(memory.peak())
"""


def test_the_largest_needs_no_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "deepseek-v3"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 5e8


def test_stages_are_laid_out_and_refused_where_they_fit_no_step() -> None:
    run = recipe("quickstart")
    tokens = 100 * run.tokens_per_step()
    longer = dataclasses.replace(run, stages=(Stage(tokens, 1024, rope_base=1e5),))
    (said,) = plan(longer)["stages"]
    assert "from step 100" in said and "4 sequences of 1,024 tokens" in said
    between = dataclasses.replace(run, stages=(Stage(tokens + 1, 1024),))
    with pytest.raises(ValueError, match="stage 1"):
        plan(between)
