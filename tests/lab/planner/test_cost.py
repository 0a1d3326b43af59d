"""Parts add up to the counts; steps, memory and decoding against sums written out by hand."""

import dataclasses

import pytest

from moebius.config import override
from moebius.lab.memory import memory_of
from moebius.lab.planner.cost import Machine, Setting, exchange_seconds, passes, step_of
from moebius.lab.planner.hardware import HOPPER, parse_cluster
from moebius.lab.planner.inference import Serving, decode, layer_of
from moebius.lab.planner.layout import Layout
from moebius.lab.planner.memory import device_bytes
from moebius.lab.planner.shape import Shape, shape_of
from moebius.lab.planner.stages import stages_of
from moebius.recipes import recipe

ONE = parse_cluster("1xH100")


@pytest.mark.parametrize(
    "name", ["llama3-405b", "deepseek-v3", "longcat-flash", "kimi-linear-nano", "hunyuan-nano"]
)
def test_parts_add_up_to_the_counts(name: str) -> None:
    shape = shape_of(recipe(name), 4096)
    assert sum(part.weight for part in shape.parts) == pytest.approx(shape.counts.flops_forward)
    params = sum(part.dense_params + part.expert_params for part in shape.parts)
    assert params == shape.counts.total
    assert sum(part.kept for part in shape.parts) > 0


def test_parts_carry_the_memory_of_the_plan() -> None:
    run = recipe("qwen3-small")
    shape = shape_of(override(run, ["precision=bf16"]), 4096)
    memory = memory_of(override(run, ["precision=bf16"]), shape.model)
    states = sum(part.dense_states + part.expert_states for part in shape.parts)
    assert states == memory.optimizer
    head = shape.width * 2
    assert sum(part.kept for part in shape.parts) + head == pytest.approx(memory.kept, rel=1e-6)


def _step(shape: Shape, text: str, layout: Layout, setting: Setting, batch: int) -> float:
    machine = Machine(parse_cluster(text))
    stages = stages_of(shape, layout.pp, setting.chunks)
    return step_of(shape, machine, layout, setting, batch, stages).seconds


def test_one_device_takes_its_products_its_attention_and_its_bytes() -> None:
    shape = shape_of(recipe("llama3-8b"), 4096)
    step = _step(shape, "1xH100", Layout(), Setting(), 16)
    kernels, counts = HOPPER["2025"], shape.counts
    tokens = 16 * 4096
    products = 3 * counts.flops_weights * tokens / kernels.matmul
    mixing = counts.flops_mixing * tokens
    attention = mixing / kernels.attention + 2.5 * mixing / kernels.attention_backward
    moved = 3 * sum(part.kept for part in shape.parts) + 32 * 2 * 8 * 4096 * 2 + 16 * shape.vocab
    gradients = 16 * 10 * counts.total
    update = 14 * counts.total + 2 * sum(part.dense_states for part in shape.parts)
    seconds = products + attention + (moved * tokens + gradients + update) / 2.90e12
    assert step == pytest.approx(seconds, rel=1e-9)


def test_a_stated_rate_is_used() -> None:
    shape = shape_of(recipe("llama3-8b"), 4096)
    unit = shape.parts[1]
    slow, fast = (
        passes(unit, shape, Machine(ONE, matmul=rate), Layout(), Setting(), 4096)[0].compute
        for rate in (300e12, 600e12)
    )
    assert slow - fast == pytest.approx((unit.of_mixers + unit.dense) * 4096 / 600e12)


def test_tensor_parallel_waits_for_its_gathers() -> None:
    shape = shape_of(recipe("llama3-8b"), 4096)
    machine = Machine(parse_cluster("1x8xH100"))
    forward, backward = passes(shape.parts[1], shape, machine, Layout(tp=8), Setting(), 4096)
    four = 4 * 4096 * 4096 * 2 * 7 / 8 / 380e9
    assert forward.exposed == pytest.approx(four) == backward.exposed


def test_context_chunks_gather_keys_and_values() -> None:
    shape = shape_of(recipe("llama3-8b"), 8192)
    machine = Machine(parse_cluster("1x8xH100"))
    forward, _ = passes(shape.parts[1], shape, machine, Layout(cp=8), Setting(), 1024)
    assert forward.exposed == pytest.approx(2 * 8 * 128 * 2 * 1024 * 7 / 380e9)


def test_experts_are_reached_through_as_many_nodes_as_a_router_allows() -> None:
    shape = shape_of(override(recipe("deepseek-v3"), ["precision=fp8"]), 4096)
    route = shape.parts[-2].routes[0]
    assert route == dataclasses.replace(route, experts=256, per_token=8.0, groups=4)
    cluster = parse_cluster("8x8xH800")
    seconds = exchange_seconds(route, shape, cluster, Layout(dp_shard=64, ep=64), 4096)
    assert seconds == pytest.approx(4096 * 4 * 7168 * (1 + 1 / 32 + 2) / 51e9)
    free = dataclasses.replace(route, groups=None)
    more = exchange_seconds(free, shape, cluster, Layout(dp_shard=64, ep=64), 4096)
    assert more / seconds == pytest.approx(8 * (1 - (7 / 8) ** 8) / 4)


def test_shortcut_blocks_hide_the_exchange_and_plain_ones_do_not() -> None:
    machine, layout = Machine(parse_cluster("8x8xH200")), Layout(dp_shard=64, ep=64)
    exposed: dict[str, float] = {}
    for name in ("longcat-flash", "deepseek-v3"):
        shape = shape_of(recipe(name), 8192)
        unit = shape.parts[-2]
        forward, _ = passes(unit, shape, machine, layout, Setting(), 8192)
        whole = exchange_seconds(unit.routes[0], shape, machine.cluster, layout, 8192)
        assert forward.exposed + forward.hidden == pytest.approx(whole)
        exposed[name] = forward.exposed / whole
    assert exposed["deepseek-v3"] == 1.0 and exposed["longcat-flash"] < 0.5


def test_sharding_divides_states_and_recompute_leaves_inputs() -> None:
    shape = shape_of(recipe("llama3-8b"), 4096)
    stages = stages_of(shape, 1, 1)
    whole, halved = (device_bytes(shape, Layout(dp_shard=n), Setting(), 16, stages) for n in (1, 2))
    masters = 4 * shape.counts.total + sum(part.dense_states for part in shape.parts)
    assert whole - halved == pytest.approx(masters / 2)
    plain, again = (
        device_bytes(shape, Layout(), Setting(recompute=flag), 16, stages) for flag in (False, True)
    )
    unit = shape.parts[1]
    kept = 32 * unit.kept - 32 * 2 * 4096 - unit.kept
    assert plain - again == pytest.approx(4096 * kept)


def test_a_decoded_layer_of_longcat_flash_by_hand() -> None:
    shape = shape_of(override(recipe("longcat-flash"), ["precision=fp8"]), 5000)
    machine = Machine(parse_cluster("16x8xH800"))
    serving = Serving(96, 5000, ep=128, tokens=2, acceptance=0.8)
    layer = layer_of(shape.parts[1], shape, machine, serving)
    core = 192 * 64 * 2 * (512 + 64 + 512) * 5000 / 660e12
    weights = 1536 * 6144 + 12_288 * 1536 + 576 * 6144 + 16_384 * 512 + 6144 * 8192
    assert layer.attention == pytest.approx(core + 2 * weights / 2.9e12, rel=1e-6)
    assert layer.dispatch == pytest.approx(192 * 8 * 6144 * (1 + 1 / 32) / 39e9)
    assert layer.combine == pytest.approx(192 * 8 * 6144 * 2 / 39e9)
    assert layer.experts == pytest.approx(192 * 8 * 2 * 3 * 6144 * 2048 / 889e12)
    total = layer.attention + layer.dispatch + layer.experts + layer.combine
    assert layer.seconds == pytest.approx(total)
    assert serving.accepted == 1.8


def test_a_token_costs_its_device_second() -> None:
    shape = shape_of(recipe("llama3-8b"), 4096)
    found = decode(shape, Machine(ONE), Serving(64, 4096))
    assert found.tokens_per_second == pytest.approx(64 / found.seconds)
    assert found.dollars(2.0) == pytest.approx(2 / 3600 * found.seconds / 64 * 1e6)
    # No quicker than reading every weight but the embedding once.
    read = 2 * (shape.counts.total - 128_256 * 4096)
    assert found.seconds > read / 2.9e12
