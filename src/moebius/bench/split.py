"""Where a step's time goes: router, dispatch, experts, attention, dense FFN, head and loss, ...

A profile of a few steps, with ranges put around calls of modules by the bench, not by the model. A
forward op belongs to the innermost range around it. A backward op belongs to the range its node was
made in: nodes carry the sequence number that autograd gave them, and a range knows which numbers it
saw. On CUDA the time of kernels counts, else that of the main thread without what it called. The
profiler slows small ops down, so shares are shares, not times.
"""

import contextlib
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, final

from torch import nn
from torch._C._autograd import DeviceType
from torch.autograd import _get_sequence_nr  # pyright: ignore
from torch.profiler import ProfilerActivity, profile, record_function

from moebius.bench.stepper import Place
from moebius.model.ends import End
from moebius.model.ends.head import Embedding, Head
from moebius.model.ffn import FeedForward
from moebius.model.ffn.moe import MoELayer
from moebius.model.ffn.routers import Router
from moebius.model.mixers import Mixer
from moebius.monitor.ceiling import synchronise

GROUPS = (
    "router",
    "dispatch",
    "experts",
    "attention",
    "dense_ffn",
    "embedding",
    "ends",
    "head_loss",
    "optimizer",
    "data",
    "other",
)
_PREFIX = "moebius:"
_NODE = "autograd::engine::evaluate_function"
# Ops inside a MoE that move rows or order them; a fused op counts as experts.
DISPATCH = re.compile(
    r"aten::_?(arg)?(sort|topk|bincount|cumsum|nonzero|where|index|gather|scatter|eq|item|zeros"
    r"|local_scalar|embedding_dense|floor_divide|fill|zero|new_zeros)"
)


@final
class Range(contextlib.ContextDecorator):
    """A name for what runs inside, and the sequence numbers that autograd gives there."""

    def __init__(self, group: str, spans: list[tuple[int, int, str]]) -> None:
        self._group, self._spans = group, spans
        self._open: list[tuple[int, Any]] = []

    def __enter__(self) -> Self:
        range_ = record_function(_PREFIX + self._group)
        range_.__enter__()
        self._open.append((_get_sequence_nr(), range_))
        return self

    def __exit__(self, *_: object) -> None:
        first, range_ = self._open.pop()
        self._spans.append((first, _get_sequence_nr(), self._group))
        range_.__exit__(None, None, None)


def _ranged(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Module, method and group of every call that gets a range; inner ones come out on top."""
    for module in model.modules():
        if isinstance(module, Mixer):
            yield module, "forward", "attention"
        elif isinstance(module, Router):
            yield module, "forward", "router"
        elif isinstance(module, MoELayer):
            yield module, "begin", "router"
            yield module, "compute", "experts"
            yield module, "finish", "experts"
        elif isinstance(module, FeedForward):
            yield module, "finish", "dense_ffn"
        elif isinstance(module, Head):
            yield module, "loss", "head_loss"
        elif isinstance(module, End):
            yield module, "forward", "ends"
        elif isinstance(module, Embedding):
            yield module, "forward", "embedding"


@contextlib.contextmanager
def ranges(model: nn.Module, optimizer: Any, loader: Any) -> Iterator[list[tuple[int, int, str]]]:
    """Put the ranges in place for the enclosed code; what they saw, as (first, end, group)."""
    spans: list[tuple[int, int, str]] = []
    places = [*_ranged(model), (optimizer, "step", "optimizer"), (loader, "batch", "data")]
    before = [vars(owner).get(name) for owner, name, _ in places]
    for owner, name, group in places:
        setattr(owner, name, Range(group, spans)(getattr(owner, name)))
    try:
        yield spans
    finally:
        for (owner, name, _), old in zip(places, before, strict=True):
            delattr(owner, name)
            if old is not None:
                setattr(owner, name, old)


def split_of(
    model: nn.Module, optimizer: Any, place: Place, step: Callable[[], None], steps: int
) -> dict[str, float]:
    """Profile `steps` calls of `step`; the share of each group, which sum to 1."""
    activities = [ProfilerActivity.CPU]
    on_device = place.device.type == "cuda"
    if on_device:
        activities.append(ProfilerActivity.CUDA)
    with ranges(model, optimizer, place.loader) as spans, profile(activities=activities) as found:
        synchronise(place.device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronise(place.device)
        wall = time.perf_counter() - start
    seconds = attribute(found.events() or [], spans, on_device)
    named = {group: seconds.get(group, 0.0) for group in GROUPS[:-1]}
    # Ranges of the profiler's own clock can come out a little longer than the wall's.
    whole = max(wall, sum(named.values()))
    shares = {group: spent / whole for group, spent in named.items()}
    return {**shares, "other": max(0.0, 1.0 - sum(shares.values()))}


def attribute(
    events: Iterable[Any], spans: Iterable[tuple[int, int, str]], on_device: bool
) -> dict[str, float]:
    """Seconds by group of a profile's events. What no range holds is `other`."""
    of_number: dict[int, str] = {}
    for first, end, group in sorted(spans, key=lambda span: span[0] - span[1]):
        of_number.update(dict.fromkeys(range(first, end), group))
    seconds: defaultdict[str, float] = defaultdict(float)
    known: dict[int, str] = {}
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, whose time its op has already
        group = _group(event, of_number, known)
        if group == "experts" and DISPATCH.match(event.name):
            group = "dispatch"
        spent = event.self_device_time_total if on_device else event.self_cpu_time_total
        seconds[group] += spent * 1e-6
    return dict(seconds)


def _group(event: Any, of_number: dict[int, str], known: dict[int, str]) -> str:
    """The group of an event: its own, or that of what encloses it."""
    chain = []
    group: str | None = None
    while event is not None and group is None:
        group = known.get(id(event))
        chain.append(event)
        if event.name.startswith(_PREFIX):
            group = event.name.removeprefix(_PREFIX)
        elif event.name.startswith(_NODE):
            group = of_number.get(event.sequence_nr)
        event = event.cpu_parent
    group = group or "other"
    known.update((id(each), group) for each in chain)
    return group
