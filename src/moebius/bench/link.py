"""A slow link for benchmarks: a process group whose every collective takes a stated time longer.

The delay runs in a thread that only waits, so it costs no CPU, as a wire does not. Beside the
wall's clock, which other programs on the machine disturb, the link keeps that of a process with a
core to itself: the CPU time of its thread, plus its waits for what arrives `delay` after the last
rank has started it by the same clock. What happened is kept as events. Product code never meets it.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Event:
    """What happened, and when: seconds by the process's own clock, from when the step began."""

    what: str
    at: float


@final
class Link(dist.ProcessGroup):
    """The collectives of `group`, `delay` seconds slower; `at_once` waits where they start.

    The ranks tell each other their clocks over `clocks`, a group of its own.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        clocks: dist.ProcessGroup,
        delay: float = 0.0,
        at_once: bool = False,
    ) -> None:
        super().__init__(group.rank(), group.size())  # pyright: ignore
        self.group, self.clocks, self.delay, self.at_once = group, clocks, delay, at_once
        self._threads = ThreadPoolExecutor(8)
        self.restart()

    def restart(self) -> None:
        """A step begins: forget what happened; collectives are counted from 1."""
        self.events: list[Event] = []
        self.started, self.waited = 0, 0.0
        self._zero = time.thread_time()

    def now(self) -> float:
        """Seconds by the clock of a process with a core to itself."""
        return time.thread_time() - self._zero + self.waited

    def note(self, what: str) -> None:
        """Something happens now."""
        self.events.append(Event(what, self.now()))

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

    def _slow(self, start: Callable[[], Any]) -> "_Late":
        self.started += 1
        self.note(f"{self.started} starts")
        began = torch.tensor([self.now()], dtype=torch.float64)
        work = start()
        told = dist.all_reduce(began, dist.ReduceOp.MAX, group=self.clocks, async_op=True)

        def arrive() -> None:
            work.wait()
            time.sleep(self.delay)

        late = _Late(self, self.started, began, told, self._threads.submit(arrive))
        if self.at_once:
            late.wait()
        return late

    def alltoall_base(
        self, out: Any, x: Any, receive: Sequence[int], send: Sequence[int], options: Any
    ) -> Any:
        def start() -> Any:
            return self.group.alltoall_base(out, x, list(receive), list(send), options)

        return self._slow(start)

    def all_to_all_single(
        self, out: Any, x: Any, receive: Sequence[int], send: Sequence[int], options: Any
    ) -> Any:
        """The same, as newer versions of torch call it."""
        return self.alltoall_base(out, x, receive, send, options)

    def allgather(self, out: Any, x: Any, options: Any) -> Any:
        return self._slow(lambda: self.group.allgather(out, x, options))

    def reduce_scatter(self, out: Any, x: Any, options: Any) -> Any:
        return self._slow(lambda: self.group.reduce_scatter(out, x, options))

    def allreduce(self, x: Any, options: Any) -> Any:
        return self._slow(lambda: self.group.allreduce(x, options))


@final
class _Late:
    """Waited for as a torch.distributed.Work is."""

    def __init__(
        self, link: Link, number: int, began: Tensor, told: Any, arrival: "Future[None]"
    ) -> None:
        self._link, self._number, self._began, self._told = link, number, began, told
        self._arrival = arrival
        self._waited = False

    def wait(self) -> bool:
        if self._waited:
            return True
        self._waited = True
        link = self._link
        link.note(f"{self._number} is waited for")
        self._arrival.result()
        self._told.wait()
        arrived = float(self._began) + link.delay
        link.events.append(Event(f"{self._number} arrived", arrived))
        link.waited += max(0.0, arrived - link.now())
        link.note(f"{self._number} goes on")
        return True
