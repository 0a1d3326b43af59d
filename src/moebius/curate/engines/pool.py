"""Worker processes of this machine; those that die are replaced and their tasks repeated."""

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import Any

from moebius.curate.engines import ATTEMPTS, Engine


def _context() -> BaseContext:
    """Workers are forked from a server that has imported the code and nothing else."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moebius.curate.work"])
    return context


class Pool(Engine):
    """A pool of processes that share nothing with this one but the arguments."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def _open(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = _context()
            self._pool = ProcessPoolExecutor(self._workers, mp_context=context)
        return self._pool

    def run(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        left = dict(enumerate(items))
        broken: Counter[int] = Counter()
        while left:
            # Only what is being worked on is at a worker, so that a death blames few tasks.
            waiting = iter(list(left.items()))
            try:
                for number, result in self._round(function, waiting):
                    del left[number]
                    yield result
            except BrokenProcessPool:
                self.close()
                first = list(left)[: 2 * self._workers]
                broken.update(first)
                if worst := [number for number in first if broken[number] >= ATTEMPTS]:
                    raise ValueError(
                        f"a worker process ended {ATTEMPTS} times on task {left[worst[0]]!r}; "
                        "is there enough memory? (fewer workers need less)"
                    ) from None

    def _round(
        self, function: Callable[[Any], Any], waiting: Iterator[tuple[int, Any]]
    ) -> Iterator[tuple[int, Any]]:
        pool = self._open()
        numbers: dict[Future[Any], int] = {}

        def submit() -> None:
            for number, item in waiting:
                numbers[pool.submit(function, item)] = number
                return

        for _ in range(2 * self._workers):
            submit()
        while numbers:
            done = next(as_completed(numbers))
            number = numbers.pop(done)
            result = done.result()
            submit()
            yield number, result

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
