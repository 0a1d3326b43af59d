"""A slow link for benchmarks: a process group whose every collective takes a stated time longer.

The delay is counted from where the collective is done on all ranks, in a thread that only waits, so
it costs no CPU, as a wire does not. What happened is kept as events. Product code never meets it.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, final

import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Event:
    """What happened, and when (seconds of a monotonic clock)."""

    what: str
    at: float


@final
class Link(dist.ProcessGroup):
    """The collectives of `group`, `delay` seconds slower; `at_once` waits where they start."""

    def __init__(self, group: dist.ProcessGroup, delay: float = 0.0, at_once: bool = False) -> None:
        super().__init__(group.rank(), group.size())  # pyright: ignore
        self.group, self.delay, self.at_once = group, delay, at_once
        self.events: list[Event] = []
        self._started = 0
        self._threads = ThreadPoolExecutor(8)

    def clear(self) -> None:
        """Forget what happened; collectives are counted from 1 again."""
        self.events, self._started = [], 0

    def note(self, what: str) -> None:
        """Something happens now."""
        self.events.append(Event(what, time.perf_counter()))

    def watch(self, name: str, part: nn.Module) -> None:
        """Note where a part of a model begins and ends, forward and backward."""
        part.register_forward_pre_hook(self._hook(f"{name} begins"))
        part.register_forward_hook(self._hook(f"{name} ends"))
        part.register_full_backward_pre_hook(self._hook(f"{name} backward begins"))
        part.register_full_backward_hook(self._hook(f"{name} backward ends"))

    def _hook(self, what: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.note(what)

        return hook

    def _slow(self, name: str, start: Callable[[], Any]) -> "_Late":
        self._started += 1
        label = f"{self._started} {name}"
        self.note(f"{label} starts")
        work = start()

        def arrive() -> float:
            work.wait()
            time.sleep(self.delay)
            return time.perf_counter()

        late = _Late(self, label, self._threads.submit(arrive))
        if self.at_once:
            late.wait()
        return late

    def alltoall_base(
        self, out: Any, x: Any, receive: Sequence[int], send: Sequence[int], options: Any
    ) -> Any:
        def start() -> Any:
            return self.group.alltoall_base(out, x, list(receive), list(send), options)

        return self._slow("all_to_all", start)

    def all_to_all_single(
        self, out: Any, x: Any, receive: Sequence[int], send: Sequence[int], options: Any
    ) -> Any:
        """The same, as newer versions of torch call it."""
        return self.alltoall_base(out, x, receive, send, options)

    def allgather(self, out: Any, x: Any, options: Any) -> Any:
        return self._slow("all_gather", lambda: self.group.allgather(out, x, options))

    def reduce_scatter(self, out: Any, x: Any, options: Any) -> Any:
        return self._slow("reduce_scatter", lambda: self.group.reduce_scatter(out, x, options))

    def allreduce(self, x: Any, options: Any) -> Any:
        return self._slow("all_reduce", lambda: self.group.allreduce(x, options))


@final
class _Late:
    """Waited for as a torch.distributed.Work is."""

    def __init__(self, link: Link, label: str, arrival: "Future[float]") -> None:
        self._link, self._label, self._arrival = link, label, arrival
        self._waited = False

    def wait(self) -> bool:
        if self._waited:
            return True
        self._waited = True
        self._link.note(f"{self._label} is waited for")
        self._link.events.append(Event(f"{self._label} arrived", self._arrival.result()))
        self._link.note(f"{self._label} goes on")
        return True
