"""The engines of curation: who executes the tasks. All give the same bytes.

A task is a picklable function of one picklable item that leaves its result in files and returns
its item; it may be run again after a worker died.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# A task whose worker ended this often is given up: it is the task, not the machine.
ATTEMPTS = 5


class Engine(ABC):
    """Executes tasks."""

    @abstractmethod
    def run(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Yield the result of each item in the order of completion.

        An exception of a task ends the run; the death of a worker repeats the task.
        """

    @abstractmethod
    def close(self) -> None:
        """Let workers go."""
