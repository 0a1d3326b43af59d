"""`moebius bench overlap`: how much of a MoE's communication its block hides.

Two processes share the experts of one layer over a `Link` that is a stated time slower. A ScMoE
block (LongCat-Flash 2.2) stands beside a pre-norm block with the same MoE; each runs as it is, and
with every exchange waited for where it starts. Exposed is what the delays add to a step, as a
share of their sum. Letters: B T tokens of a process, D width.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from moebius.bench.agreement import TOLERANCE, error
from moebius.bench.link import Event, Link
from moebius.bench.timeline import EXCHANGES
from moebius.bench.timing import WARM_UP
from moebius.config import from_json
from moebius.model.block import Block, BlockConfig
from moebius.model.block.prenorm import PreNorm
from moebius.model.block.scmoe import ScMoE
from moebius.model.context import Context
from moebius.model.ffn.dense import Dense
from moebius.model.ffn.moe import MoE, routers_of
from moebius.model.mixers.gqa import GQA
from moebius.model.part import Site
from moebius.model.weight import initialise
from moebius.ops.ranks import Exchange, Ranks

RANKS = 2


@dataclass(frozen=True)
class Setting:
    """What is measured: the delay of every exchange, the shape, and how tokens travel."""

    delay: float = 0.01
    tokens: int = 256
    width: int = 256
    exchange: str = "all_to_all"
    repeats: int = 10
    warm_up: int = WARM_UP

    def blocks(self) -> dict[str, BlockConfig]:
        """The two blocks, with the same mixer and MoE."""
        mixer = GQA(heads=4, kv_heads=2, head_width=self.width // 4)
        moe = MoE(experts=16, expert_width=self.width // 4, top_k=2)
        dense = Dense(8 * self.width)
        return {"scmoe": ScMoE(mixer, dense, moe), "prenorm": PreNorm(mixer, moe)}


class Way(NamedTuple):
    """One way to run a step."""

    delayed: bool
    overlap: bool


WAYS = tuple(Way(delayed, overlap) for overlap in (True, False) for delayed in (False, True))


def bench_overlap(setting: Setting) -> dict[str, Any]:
    """Run both processes; rows by block and overlap, and what happened in a step of each block."""
    if setting.tokens < 1 or setting.width < 8 or setting.width % 8 or setting.delay < 0:
        raise ValueError("tokens must be at least 1, width a multiple of 8, the delay not below 0")
    _exchange(setting)
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (setting, folder), RANKS)
        return json.loads((Path(folder) / "found.json").read_text())


def _exchange(setting: Setting) -> Exchange:
    return from_json(Exchange, setting.exchange, "exchange")


def _rank(rank: int, setting: Setting, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    clocks = dist.new_group()
    assert isinstance(clocks, dist.ProcessGroup)
    cases = {name: _Case(config, setting, clocks) for name, config in setting.blocks().items()}
    errors = {name: case.error() for name, case in cases.items()}
    times = _times(cases, setting)
    rows = [
        _row(name, overlap, times, setting, errors[name])
        for name in cases
        for overlap in (True, False)
    ]
    result = {
        "ranks": RANKS,
        "setting": asdict(setting),
        "rows": rows,
        "notes": _notes(rows),
        "events": {name: [[e.what, e.at] for e in case.events()] for name, case in cases.items()},
    }
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(result))
    dist.destroy_process_group()


@final
class _Case:
    """One block on this rank, its experts cut, and the links it can use."""

    def __init__(self, config: BlockConfig, setting: Setting, clocks: dist.ProcessGroup) -> None:
        self._setting, self._config = setting, config
        assert dist.group.WORLD is not None
        self.links = {
            way: Link(dist.group.WORLD, clocks, setting.delay * way.delayed, not way.overlap)
            for way in WAYS
        }
        tokens_BT = torch.zeros(1, setting.tokens, dtype=torch.int64)
        self._ctx = Context.continuing(tokens_BT, 0)
        generator = torch.Generator().manual_seed(dist.get_rank())
        shape = (2, 1, setting.tokens, setting.width)
        self._x_BTD, self._grad_BTD = torch.randn(shape, generator=generator)
        self.block = self._built()
        (self._moe,) = routers_of(self.block)
        cut = self._moe.spread(self._ranks(WAYS[0]))
        self._cut = {name for name, part in cut.items() if part.group is not None}
        for name in self._cut:
            weight = self._moe.get_parameter(name)
            weight.data = weight.data.chunk(RANKS)[dist.get_rank()].clone()

    def _built(self) -> Block:
        block = self._config.build(Site(self._setting.width, self._config.num_writes, 0, 1e-5))
        initialise(block, 0)
        return block

    def _ranks(self, way: Way) -> Ranks:
        return Ranks(experts=self.links[way], exchange=_exchange(self._setting))

    def step(self, way: Way) -> list[Tensor]:
        """Forward and backward; the output, and the gradients of the input and the weights."""
        self._moe.spread(self._ranks(way))
        self.links[way].restart()
        return self._results(self.block)

    def _results(self, block: Block) -> list[Tensor]:
        x_BTD = self._x_BTD.clone().requires_grad_()
        y_BTD = block(x_BTD, self._ctx, None, {}).x_BTD
        inputs = [x_BTD, *block.parameters()]
        return [y_BTD.detach(), *torch.autograd.grad(y_BTD, inputs, self._grad_BTD)]

    def error(self) -> float:
        """The largest relative error of any way to the block on one process alone."""
        truth = self._results(whole := self._built())
        for (name, _), grad in zip(whole.named_parameters(), truth[2:], strict=True):
            if self._is_cut(name):
                dist.all_reduce(grad)
        truth[2:] = [
            grad.chunk(RANKS)[dist.get_rank()] if self._is_cut(name) else grad
            for (name, _), grad in zip(whole.named_parameters(), truth[2:], strict=True)
        ]
        return max(error(truth, self.step(way)) for way in WAYS)

    def _is_cut(self, name: str) -> bool:
        return any(name.endswith(f".{own}") for own in self._cut)

    def events(self) -> list[Event]:
        """What happened in one step over the slow link."""
        way = Way(delayed=True, overlap=True)
        for name, part in self.block.named_children():
            if "norm" not in name:
                self.links[way].watch(name, part)
        self.step(way)
        return list(self.links[way].events)


class _Seconds(NamedTuple):
    """A step's time, by the clock of a process with a core to itself and by the wall's."""

    own: float
    wall: float


_Times = Mapping[tuple[str, Way], Sequence[_Seconds]]


def _times(cases: dict[str, _Case], setting: Setting) -> _Times:
    """The seconds of every step, all ways in turns."""
    works = {(name, way): (case, way) for name, case in cases.items() for way in WAYS}
    seconds: dict[tuple[str, Way], list[_Seconds]] = {key: [] for key in works}
    for turn in range(setting.warm_up + setting.repeats):
        for key, (case, way) in works.items():
            dist.barrier()
            start = time.perf_counter()
            case.step(way)
            elapsed = _Seconds(case.links[way].now(), time.perf_counter() - start)
            assert case.links[way].started == len(EXCHANGES)
            if turn >= setting.warm_up:
                seconds[key].append(elapsed)
    return seconds


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """How to read it; no share where results disagree."""
    notes = [
        "ms are those of a process with a core to itself: the CPU time of its thread, and its "
        "waits; exposed is what the delays add to them, as a share of the sum of delays."
    ]
    if not all(row["agrees"] for row in rows):
        return [*notes, "RESULTS DISAGREE with one process: no share means anything."]
    scmoe, prenorm = (
        next(row["own_exposed"] for row in rows if row["name"] == name and row["overlap"])
        for name in ("scmoe", "prenorm")
    )
    if scmoe is None or prenorm is None or prenorm <= 0:
        return notes
    return [*notes, f"Of what prenorm exposes, scmoe hides {1 - scmoe / prenorm:.0%}."]


def _row(name: str, overlap: bool, times: _Times, setting: Setting, error: float) -> dict[str, Any]:
    quick, slow = (times[name, Way(delayed, overlap)] for delayed in (False, True))
    injected = len(EXCHANGES) * setting.delay
    found: dict[str, Any] = {"name": name, "overlap": overlap}
    for clock in _Seconds._fields:
        pairs = [(getattr(q, clock), getattr(s, clock)) for q, s in zip(quick, slow, strict=True)]
        found[f"{clock}_seconds"] = statistics.median(q for q, _ in pairs)
        found[f"{clock}_seconds_delayed"] = statistics.median(s for _, s in pairs)
        # Of turns, not of medians: what else the machine does meets both of a pair.
        added = statistics.median(s - q for q, s in pairs)
        found[f"{clock}_exposed"] = added / injected if injected else None
    return {**found, "error": error, "agrees": error <= TOLERANCE[torch.float32]}
