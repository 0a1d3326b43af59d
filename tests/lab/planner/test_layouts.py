"""Clusters, legal layouts and pipelines, against brute force."""

import dataclasses
import itertools

import pytest

from moebius.config import override
from moebius.lab.planner.hardware import DEVICES, parse_cluster
from moebius.lab.planner.layout import Layout, legal_layouts, spread
from moebius.lab.planner.shape import shape_of
from moebius.lab.planner.stages import cuts_of, idle, in_flight, stages_of
from moebius.recipes import recipe


def test_clusters_are_read() -> None:
    cluster = parse_cluster("2x8xh200")
    assert (cluster.nodes, cluster.per_node, cluster.device.name) == (2, 8, "H200")
    assert parse_cluster("4xB200").size == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [("2x8xH20", "did you mean 'H200'"), ("eight", "such as 2x8xH200"), ("0x8xH100", "no devices")],
)
def test_bad_clusters_say_what_is_known(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_cluster(text)


@pytest.mark.parametrize("name", DEVICES)
def test_no_kernel_beats_its_data_sheet(name: str) -> None:
    device = DEVICES[name]
    for kernels in device.kernels.values():
        rates = dataclasses.asdict(kernels)
        in_fp8 = [rates.pop("matmul_fp8"), rates.pop("grouped_fp8")]
        assert max(rates.values()) < device.peak
        assert max(in_fp8) <= max(device.peak_fp8, device.peak * 2)


@pytest.mark.parametrize(("name", "batch"), [("qwen3-nano", 12), ("llama3-small", 16)])
def test_layouts_are_all_that_divide(name: str, batch: int) -> None:
    """Of every product of degrees that makes 12 or 16 devices."""
    for text in ("3x4xH100", "2x8xH200"):
        cluster, shape = parse_cluster(text), shape_of(recipe(name), 512)
        degrees = [d for d in range(1, cluster.size + 1) if cluster.size % d == 0]
        wanted = {
            Layout(replicate, shard, ep, tp, pp, cp)
            for replicate, shard, tp, pp, cp, ep in itertools.product(degrees, repeat=6)
            if replicate * shard * tp * pp * cp == cluster.size
            and batch % (replicate * shard) == 0
            and cluster.per_node % tp == 0
            and all(size % tp == 0 for _, size in shape.heads)
            and pp <= shape.units
            and (cp == 1 or 512 % (2 * cp) == 0)
            and (shard * cp) % ep == 0
            and (ep == 1 or bool(shape.experts))
            and all(size % ep == 0 for size in shape.experts)
        }
        found = legal_layouts(shape, cluster, batch)
        assert len(found) == len(set(found)) and set(found) == wanted


def test_what_a_model_divides_by_is_read_from_its_config() -> None:
    shape = shape_of(recipe("llama3-8b"), 4096)
    assert dict(shape.heads) == {
        "heads": 32,
        "hidden": 14_336,
        "kv_heads": 8,
        "vocab": 128_256,
    }
    assert shape_of(recipe("longcat-flash"), 4096).experts == (512,)


def test_no_layout_is_said() -> None:
    shape = shape_of(override(recipe("llama3-nano"), ["vocab=257"]), 512)
    with pytest.raises(ValueError, match="change --batch-tokens or the cluster"):
        legal_layouts(shape, parse_cluster("1x7xH100"), 8)


def test_a_ring_has_the_cards_of_its_members_in_a_node() -> None:
    cluster = parse_cluster("4x8xH100")
    card, link = cluster.device.network, cluster.device.nvlink
    assert spread(cluster, 1, 8) == link
    assert spread(cluster, 8, 4) == card
    assert spread(cluster, 2, 8) == 4 * card
    assert spread(cluster, 1, 16) == 8 * card < link


def test_pieces_are_as_even_as_they_can_be() -> None:
    weights = [0.1, 3.0, 2.0, 2.0, 5.0, 1.0, 1.0, 0.5]
    for pieces in range(1, 9):
        best = min(
            max(sum(weights[a:b]) for a, b in itertools.pairwise((0, *ends, len(weights))))
            for ends in itertools.combinations(range(1, len(weights)), pieces - 1)
        )
        cuts = cuts_of(weights, pieces)
        assert len(cuts) == pieces + 1 and cuts == sorted(set(cuts))
        heaviest = max(sum(weights[a:b]) for a, b in itertools.pairwise(cuts))
        assert heaviest == pytest.approx(best)


def test_llama_puts_one_layer_in_a_chunk() -> None:
    """126 layers, embedding and head are 16 x 8 chunks; first and last rank have 7 layers."""
    stages = stages_of(shape_of(recipe("llama3-405b"), 8192), 16, 8)
    held = {stage.rank: {part.name: count for part, count in stage.parts} for stage in stages}
    assert held == {0: {"embed": 1, "unit": 7}, 1: {"unit": 8}, 15: {"unit": 7, "head": 1}}


def one_f_one_b(pp: int, micro: int, forward: float, backward: float) -> tuple[float, list[int]]:
    """The end of 1F1B played out rank by rank, and the most micro-batches each has in flight."""
    orders: list[list[tuple[str, int]]] = []
    for rank in range(pp):
        warm = min(micro, pp - rank - 1)
        order = [("f", i) for i in range(warm)]
        for i in range(micro - warm):
            order += [("f", warm + i), ("b", i)]
        orders.append(order + [("b", i) for i in range(micro - warm, micro)])
    ends: dict[tuple[int, str, int], float] = {}
    clock, at = [0.0] * pp, [0] * pp
    while any(at[rank] < len(orders[rank]) for rank in range(pp)):
        for rank in range(pp):
            if at[rank] == len(orders[rank]):
                continue
            kind, i = orders[rank][at[rank]]
            before = (rank - 1, "f", i) if kind == "f" else (rank + 1, "b", i)
            if 0 <= before[0] < pp and before not in ends:
                continue
            start = max(clock[rank], ends.get(before, 0.0))
            clock[rank] = start + (forward if kind == "f" else backward)
            ends[rank, kind, i] = clock[rank]
            at[rank] += 1
    most: list[int] = []
    for order in orders:
        held = [sum(1 if kind == "f" else -1 for kind, _ in order[:n]) for n in range(len(order))]
        most.append(max(held))
    return max(clock), most


@pytest.mark.parametrize(("pp", "micro"), [(2, 2), (4, 4), (4, 9), (5, 8)])
def test_the_idle_share_is_that_of_a_pipeline_played_out(pp: int, micro: int) -> None:
    end, most = one_f_one_b(pp, micro, 1.0, 2.0)
    assert end == pytest.approx(micro * 3.0 + idle("interleaved", pp, 1, 1.0, 2.0))
    assert most == [in_flight("interleaved", pp, 1, rank, micro) for rank in range(pp)]


def test_more_chunks_wait_less_and_hold_more() -> None:
    assert idle("interleaved", 16, 8, 1.0, 2.0) == 15 / 8 * 3.0
    assert idle("dualpipe", 16, 1, 1.0, 2.0) == 7 * (3.0 + 2.0 - 3.0)
    assert in_flight("interleaved", 4, 2, 0, 64) > in_flight("interleaved", 4, 1, 0, 64)
