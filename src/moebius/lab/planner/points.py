"""Published runs against the planner, with the kernels of their time and the layouts their reports
state.

Llama 3: arXiv 2407.21783, table 4. DeepSeek-V3: 2412.19437, table 1 and section 3.2 (with its MTP
layer, as a dense one of as many FLOPs). LongCat-Flash: 2509.01322, tables 6 and 7; one draft
accepted at 80%.

Whole training runs take longer than their kernels and links. How much longer is fitted, one left
out: the factor that a run is predicted with is the geometric mean of the others' alone.
"""

import dataclasses
import math
from collections.abc import Sequence

from moebius.config import override
from moebius.lab.planner.cost import Machine, Setting, step_of
from moebius.lab.planner.hardware import parse_cluster
from moebius.lab.planner.inference import Serving, decode, layer_of
from moebius.lab.planner.layout import Layout
from moebius.lab.planner.shape import shape_of
from moebius.lab.planner.stages import stages_of
from moebius.train.run import Run


@dataclasses.dataclass(frozen=True)
class Point:
    """A published number and ours; `bound` says what is known of the difference. `alone` is what
    kernels and links alone would make, where the prediction is of a whole run."""

    name: str
    unit: str
    published: float
    predicted: float
    bound: str = ""
    alone: float | None = None

    @property
    def deviation(self) -> float:
        """Of the prediction from the publication."""
        return self.predicted / self.published - 1.0


@dataclasses.dataclass(frozen=True)
class Trained:
    """A published training run: where it ran and how, and what is known of it (MFU or hours)."""

    cluster: str
    time: str
    context: int
    batch: int
    layout: Layout
    setting: Setting
    mfu: float | None = None
    tokens: float = 0.0
    million_hours: float = 0.0


@dataclasses.dataclass(frozen=True)
class Served:
    """A row of LongCat-Flash's table of measured decoding: tokens/s of a device and of a user."""

    precision: str
    context: int
    device: float
    user: float
    bound: str = ""


PEAK = "theirs is at the data sheet's peak, ours as DeepGEMM measures; the layer is within 10%"
SMALL = (
    "theory, as theirs, without small operators and lost bandwidth: they measure 61.5% of it at "
    "batch 96 (6.3.2)"
)

# One layer a chunk: a first or last chunk holds the embedding or the head alone (3.3.2).
_PIPELINE = Setting(chunks=8)
_SPRING = "early 2024"
LLAMA = (
    Trained("1024x8xH100", _SPRING, 8192, 2048, Layout(1, 64, 1, 8, 16, 1), _PIPELINE, 0.43),
    Trained("2048x8xH100", _SPRING, 8192, 2048, Layout(1, 128, 1, 8, 16, 1), _PIPELINE, 0.41),
    Trained("2048x8xH100", _SPRING, 131_072, 128, Layout(1, 8, 1, 8, 16, 16), _PIPELINE, 0.38),
)
DEEPSEEK = Trained(
    "256x8xH800",
    "late 2024",
    4096,
    15_360,
    Layout(1, 128, 64, 1, 16, 1),
    Setting(chunks=2, schedule="dualpipe"),
    tokens=14.8e12,
    million_hours=2.664,
)
SERVED = (
    Served("bf16", 5000, 3785, 35.0),
    Served("bf16", 5000, 2205, 68.9, SMALL),
    # What 804 cost at $2 an hour, $0.69 per million tokens, is arithmetic and no point.
    Served("bf16", 5000, 804, 100.5),
    Served("fp8", 5000, 4230, 26.4, SMALL),
    Served("fp8", 8192, 3240, 33.8, SMALL),
)


def simulated(run: Run, trained: Trained) -> tuple[float, float]:
    """Tokens per second of the cluster by kernels and links alone, and MFU."""
    cluster = parse_cluster(trained.cluster)
    shape = shape_of(run, trained.context)
    stages = stages_of(shape, trained.layout.pp, trained.setting.chunks)
    machine = Machine(cluster, trained.time)
    step = step_of(shape, machine, trained.layout, trained.setting, trained.batch, stages)
    rate = trained.batch * trained.context / step.seconds
    return rate, shape.counts.flops_train * rate / cluster.size / cluster.device.peak


def whole_run(ratios: Sequence[float]) -> float:
    """How many times its kernels' seconds a step took in such runs: their geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def training_points(llama: Run, deepseek: Run) -> list[Point]:
    """Llama 3 405B and DeepSeek-V3, as their recipes say (DeepSeek-V3 with MTP and in fp8)."""
    runs = [("Llama 3 405B", llama, trained) for trained in LLAMA]
    alone = [_alone(*one) for one in (*runs, ("DeepSeek-V3", deepseek, DEEPSEEK))]
    # Hours are seconds; MFU goes with one over them.
    ratios = [p.published / p.predicted if p.unit == "M hours" else 1 + p.deviation for p in alone]
    points: list[Point] = []
    for i, point in enumerate(alone):
        factor = whole_run([*ratios[:i], *ratios[i + 1 :]])
        longer = factor if point.unit == "M hours" else 1.0 / factor
        predicted = point.predicted * longer
        points.append(dataclasses.replace(point, predicted=predicted, alone=point.predicted))
    return points


def _alone(name: str, run: Run, trained: Trained) -> Point:
    rate, mfu = simulated(run, trained)
    name = f"{name}, {trained.cluster}, {trained.context:,} tokens"
    if trained.mfu is not None:
        return Point(name, "MFU", trained.mfu, mfu)
    hours = trained.tokens / rate / 3600 * parse_cluster(trained.cluster).size / 1e6
    return Point(name, "M hours", trained.million_hours, hours)


def decoding_points(longcat: Run) -> list[Point]:
    """LongCat-Flash on 128 H800: theory (in fp8) by layer and token, and what was measured."""
    machine, context = Machine(parse_cluster("16x8xH800")), 5000
    shape = shape_of(override(longcat, ["precision=fp8"]), context)
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
    return [*points, *(_measured(longcat, served, machine) for served in SERVED)]


def _measured(longcat: Run, served: Served, machine: Machine) -> Point:
    shape = shape_of(override(longcat, [f"precision={served.precision}"]), served.context)
    sequences = served.device / served.user
    serving = Serving(sequences, served.context, ep=128, tokens=2, acceptance=0.8)
    rate = decode(shape, machine, serving).tokens_per_second
    name = f"LongCat-Flash, {served.precision}, {served.context:,} tokens, {served.user} a user"
    return Point(name, "tokens/s", served.device, rate, served.bound)
