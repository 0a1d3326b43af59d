"""Workers of a Ray cluster; a folder that all of them see takes the results.

`pip install 'moebius[ray]'`. Without an address a cluster of this machine is started for the run.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moebius.curate.engines import ATTEMPTS, Engine


class Ray(Engine):
    """Tasks as Ray tasks, one core each, repeated where a worker or a node dies."""

    def __init__(self, workers: int, address: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError(
                "engine=ray needs the ray extra: pip install 'moebius[ray]'"
            ) from error
        self._ray: Any = ray
        self._workers = workers
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                num_cpus=workers,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )

    def run(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        remote = self._ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)(function)
        waiting = iter(items)
        running: list[Any] = []

        def submit() -> None:
            for item in waiting:
                running.append(remote.remote(item))
                return

        for _ in range(4 * self._workers):
            submit()
        while running:
            (done, *_), _ = self._ray.wait(running, num_returns=1)
            running.remove(done)
            try:
                result = self._ray.get(done)
            except self._ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from None
            submit()
            yield result

    def close(self) -> None:
        self._ray.shutdown()
