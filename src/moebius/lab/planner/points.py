"""Published runs against the planner: each predicted from the constants alone, with the kernels of
its year and the layout its report states.

Llama 3: arXiv 2407.21783, table 4. DeepSeek-V3: 2412.19437, table 1 and section 3.2 (with its MTP
layer, as a dense one of as many FLOPs). LongCat-Flash: 2509.01322, tables 6 and 7; cache of 5,000
tokens, one draft accepted at 80%.
"""

import dataclasses

from moebius.lab.planner.cost import Machine, Setting, step_of
from moebius.lab.planner.hardware import parse_cluster
from moebius.lab.planner.inference import Serving, decode, layer_of
from moebius.lab.planner.layout import Layout
from moebius.lab.planner.shape import shape_of
from moebius.lab.planner.stages import stages_of
from moebius.train.run import Run


@dataclasses.dataclass(frozen=True)
class Point:
    """A published number and ours; `bound` says what is known of the difference."""

    name: str
    unit: str
    published: float
    predicted: float
    bound: str = ""

    @property
    def deviation(self) -> float:
        """Of the prediction from the publication."""
        return self.predicted / self.published - 1.0


@dataclasses.dataclass(frozen=True)
class Trained:
    """A published training run: where it ran and how."""

    cluster: str
    year: str
    context: int
    batch: int
    layout: Layout
    setting: Setting


SCALE = (
    "every kernel runs at its best in isolation: power, stragglers and launch gaps of thousands of "
    "devices have no public micro-benchmark"
)
UNEVEN = (
    "uneven expert loads, launch gaps and recomputed parts (3.2.3) have no public rates, nor have "
    "its own kernels of 2024"
)
PEAK = "theirs is at the data sheet's peak, ours as DeepGEMM measures; the layer is within 10%"
SMALL = (
    "theory, as theirs, without small operators and lost bandwidth: they measure 61.5% of it at "
    "batch 96 (6.3.2)"
)

# One layer a chunk: a first or last chunk holds the embedding or the head alone (3.3.2).
_PIPELINE = Setting(chunks=8)
LLAMA = {
    0.43: Trained("1024x8xH100", "2023", 8192, 2048, Layout(1, 64, 1, 8, 16, 1), _PIPELINE),
    0.41: Trained("2048x8xH100", "2023", 8192, 2048, Layout(1, 128, 1, 8, 16, 1), _PIPELINE),
    0.38: Trained("2048x8xH100", "2023", 131_072, 128, Layout(1, 8, 1, 8, 16, 16), _PIPELINE),
}
DEEPSEEK = Trained(
    "256x8xH800",
    "2024",
    4096,
    15_360,
    Layout(1, 128, 64, 1, 16, 1),
    Setting(chunks=2, schedule="dualpipe"),
)


def tokens_per_second(run: Run, trained: Trained) -> tuple[float, float]:
    """Tokens per second of the cluster, and MFU."""
    cluster = parse_cluster(trained.cluster)
    shape = shape_of(run, trained.context)
    stages = stages_of(shape, trained.layout.pp, trained.setting.chunks)
    machine = Machine(cluster, trained.year)
    step = step_of(shape, machine, trained.layout, trained.setting, trained.batch, stages)
    rate = trained.batch * trained.context / step.seconds
    return rate, shape.counts.flops_train * rate / cluster.size / cluster.device.peak


def training_points(llama: Run, deepseek: Run) -> list[Point]:
    """Llama 3 405B and DeepSeek-V3, as their recipes say (DeepSeek-V3 with MTP and in fp8)."""
    points = [
        Point(
            f"Llama 3 405B, {trained.cluster}, {trained.context:,} tokens",
            "MFU",
            published,
            tokens_per_second(llama, trained)[1],
            SCALE if trained.cluster.startswith("1024x") else "",
        )
        for published, trained in LLAMA.items()
    ]
    rate, _ = tokens_per_second(deepseek, DEEPSEEK)
    hours = 14.8e12 / rate / 3600 * parse_cluster(DEEPSEEK.cluster).size / 1e6
    name = "DeepSeek-V3, 14.8T tokens, 256x8xH800"
    return [*points, Point(name, "M hours", 2.664, hours, UNEVEN)]


def decoding_points(longcat: Run) -> list[Point]:
    """LongCat-Flash in fp8 on 128 H800: theory by layer and token, and what was measured."""
    machine, context = Machine(parse_cluster("16x8xH800")), 5000
    shape = shape_of(longcat, context)
    full = Serving(96, context, ep=128, tokens=2, acceptance=0.8)
    unit = next(part for part in shape.parts if part.name == "unit")
    layer = layer_of(unit, shape, machine, full)
    modules = (
        ("attention", 264.0, layer.attention),
        ("dispatch", 236.0, layer.dispatch),
        ("experts", 60.0, layer.experts),
        ("combine", 472.0, layer.combine),
        ("layer", 1032.0, layer.seconds),
    )
    points = [
        Point(f"LongCat-Flash, {name}", "us", us, s * 1e6, PEAK if name == "experts" else "")
        for name, us, s in modules
    ]
    per_token = shape.units * layer.seconds / full.accepted * 1e3
    points.append(Point("LongCat-Flash, a token in theory", "ms", 16.05, per_token))
    # 804 tokens/s a device at 100.5 a user: 8 users a device. What that costs at $2 an hour, $0.69
    # per million, is arithmetic and no point.
    fast = decode(shape, machine, dataclasses.replace(full, batch=8)).tokens_per_second
    return [*points, Point("LongCat-Flash, measured at 100 TPS", "tokens/s", 804, fast, SMALL)]
