"""All tasks one after the other in this process."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moebius.curate.engines import Engine


class Local(Engine):
    """This process."""

    def run(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return map(function, items)

    def close(self) -> None:
        pass
